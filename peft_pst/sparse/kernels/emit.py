"""The inner loops as LLVM instructions on vectors, which LLVM lowers to AVX-512, AVX2 or NEON.

Every function here reads and writes through addresses, int64, and trusts them: `worker.py`, which calls them, and
`layout.py`, which makes what they read, keep the bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir

from .layout import SLICE, WORD, Kind
from .target import CONVERTS_HALF, FEATURES, HAS_HALF, LANES, REGISTERS, WIDTHS

F16, F32 = ir.HalfType(), ir.FloatType()
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
VALUE = {Kind.FP32: F32, Kind.BF16: I16, Kind.INT8: I8, Kind.FP16: F16}


def number(value: int) -> ir.Constant:
    """A constant int64."""
    return ir.Constant(I64, value)


def load(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type, offset: int = 0) -> ir.Value:
    """What lies `offset` bytes behind an address, which need be aligned to single entries only."""
    return builder.load(_pointer(builder, address, kind, offset), align=_entry_bytes(kind))


def store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value, offset: int = 0) -> None:
    """The counterpart of `load`."""
    builder.store(value, _pointer(builder, address, value.type, offset), align=_entry_bytes(value.type))


def fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a · b + c, rounded once; in fp16 without the instruction for it, by way of fp32."""
    vector = a.type
    if vector.element == F16 and "avx512fp16" not in FEATURES:
        wide = ir.VectorType(F32, vector.count)
        return builder.fptrunc(fma(builder, *(builder.fpext(x, wide) for x in (a, b, c))), vector)
    entry = {F32: "f32", F16: "f16"}[vector.element]
    name = f"llvm.fma.v{vector.count}{entry}"
    function = builder.module.globals.get(name) or ir.Function(
        builder.module, ir.FunctionType(vector, [vector] * 3), name
    )
    return builder.call(function, [a, b, c])


def splat(builder: ir.IRBuilder, vector: ir.Value, lane: int, lanes: int) -> ir.Value:
    """One entry of a vector in every lane."""
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), _indices([lane] * lanes))


def prefetch(builder: ir.IRBuilder, address: ir.Value, ahead: int) -> None:
    """Have the processor fetch what lies so many bytes ahead."""
    pointer, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
    name = "llvm.prefetch.p0"
    function = builder.module.globals.get(name) or ir.Function(
        builder.module, ir.FunctionType(ir.VoidType(), [pointer, flag, flag, flag]), name
    )
    address = builder.inttoptr(builder.add(address, number(ahead)), pointer)
    builder.call(function, [address, *(ir.Constant(flag, value) for value in (0, 2, 1))])


def zeros(kind: ir.Type, lanes: int) -> ir.Constant:
    """A vector of zeros."""
    return ir.Constant(ir.VectorType(kind, lanes), [0.0] * lanes)


def widen(builder: ir.IRBuilder, values: ir.Value, kind: Kind) -> ir.Value:
    """Stored values as fp32."""
    lanes = values.type.count
    if kind is Kind.BF16:
        wide = ir.VectorType(I32, lanes)
        bits = builder.shl(builder.zext(values, wide), ir.Constant(wide, [16] * lanes))
        return builder.bitcast(bits, ir.VectorType(F32, lanes))
    if kind is Kind.INT8:
        return builder.sitofp(values, ir.VectorType(F32, lanes))
    if kind is Kind.FP16:
        return builder.fpext(values, ir.VectorType(F32, lanes)) if CONVERTS_HALF else _half_by_bits(builder, values)
    return values


def _half_by_bits(builder: ir.IRBuilder, values: ir.Value) -> ir.Value:
    """fp16 as fp32 without the instruction for it: the same bits in their new places, times 2^112."""
    lanes = values.type.count
    floats, integers = ir.VectorType(F32, lanes), ir.VectorType(I32, lanes)

    def every(value: int) -> ir.Constant:
        return ir.Constant(integers, [value] * lanes)

    bits = builder.zext(builder.bitcast(values, ir.VectorType(I16, lanes)), integers)
    magnitude = builder.shl(builder.and_(bits, every(0x7FFF)), every(13))
    sign = builder.shl(builder.and_(bits, every(0x8000)), every(16))
    finite = builder.fmul(builder.bitcast(magnitude, floats), ir.Constant(floats, [2.0**112] * lanes))
    infinite = builder.icmp_unsigned(">=", magnitude, every(0x7C00 << 13))
    magnitude = builder.select(infinite, builder.or_(magnitude, every(0x7F800000)), builder.bitcast(finite, integers))
    return builder.bitcast(builder.or_(magnitude, sign), floats)


def transpose(builder: ir.IRBuilder, rows: Sequence[ir.Value]) -> list[ir.Value]:
    """The columns of as many vectors as they have lanes.

    First squares of 4 x 4 inside each 128 bits, then the 128 bits between the vectors: processors have one instruction
    for each of these shuffles.
    """
    lanes = range(0, len(rows), 4)
    vectors = list(rows)
    for step, low, high in ((1, (0, None, 1, None), (2, None, 3, None)), (2, (0, 1, None, None), (2, 3, None, None))):
        for i in (i for i in range(len(rows)) if not i & step):
            a, b = vectors[i], vectors[i + step]
            for place, pattern in ((i, low), (i + step, high)):
                own = [entry for entry in pattern if entry is not None]
                others = iter(own)
                mask = [entry if entry is not None else len(rows) + next(others) for entry in pattern]
                vectors[place] = builder.shuffle_vector(
                    a, b, _indices([lane + entry for lane in lanes for entry in mask])
                )
    columns = [_deal(builder, vectors[place::4]) for place in range(4)]
    # of the 4 x 4 squares, the second and the third column changed places
    return [columns[place][lane] for lane in range(len(lanes)) for place in (0, 2, 1, 3)]


def _deal(builder: ir.IRBuilder, vectors: Sequence[ir.Value]) -> list[ir.Value]:
    """The transpose of a square of 128-bit lanes: by halves, the even and the odd lanes."""
    if len(vectors) == 1:
        return list(vectors)
    entries = range(2 * vectors[0].type.count)
    dealt = []
    for odd in (0, 1):
        mask = _indices([entry for entry in entries if entry // 4 % 2 == odd])
        dealt.append(
            _deal(
                builder, [builder.shuffle_vector(a, b, mask) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
            )
        )
    return [vector for pair in zip(*dealt, strict=True) for vector in pair]


def call_segment(builder: ir.IRBuilder, code: ir.Value, arguments: Sequence[ir.Value]) -> None:
    """Call the function of `segment` for a kind of value, blocks or not, and a width: those of `segment_code`."""
    otherwise, after = builder.append_basic_block(), builder.append_basic_block()
    switch = builder.switch(code, otherwise)
    for kind in Kind:
        for blocks in (False, True):
            for width in WIDTHS:
                case = builder.append_basic_block()
                switch.add_case(number(segment_code(kind, blocks, width)), case)
                builder.position_at_end(case)
                builder.call(segment(builder.module, kind, blocks, width), arguments)
                builder.branch(after)
    builder.position_at_end(otherwise)
    builder.unreachable()
    builder.position_at_end(after)


def segment_code(kind: int, blocks: int, width: int) -> int:
    """The number of a function of `segment`. It is plain arithmetic, so machine code can do it too."""
    return (kind * 2 + blocks) * 64 + width - 1


def computes_in_half(kind: Kind, width: int) -> bool:
    """Whether a panel of that width is multiplied in fp16: few tokens gain nothing from it."""
    return HAS_HALF and kind is Kind.FP16 and width >= LANES


def segment(module: ir.Module, kind: Kind, blocks: bool, width: int) -> ir.Function:
    """The function that multiplies a segment of a weight with a tile of a panel and adds to sums.

    A segment is `slices` slices of 8 rows. Its arguments, all int64, are the addresses of: the tile, [columns, width]
    in fp32 or fp16; the indices, uint8; the values; `counts`, int32 [slices]; `rows`, uint8 [slices, 8], which row of
    `sums` each row of a slice is; `slices` itself; `sums`, fp32 [rows, width].
    """
    name = f"segment_{kind.name}_{'blocks' if blocks else 'entries'}_{width}".lower()
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 7), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block())
    tile, indices, values, counts, rows, slices, sums = function.args
    half = computes_in_half(kind, width)
    lanes = min(width, 2 * LANES if half else LANES)
    registers = width // lanes
    together = _rows_together(registers)

    entry, head, body, after = builder.block, *(function.append_basic_block() for _ in range(3))
    builder.branch(head)
    builder.position_at_end(head)
    number_of_slice, place = builder.phi(I64), builder.phi(I64)
    number_of_slice.add_incoming(number(0), entry)
    place.add_incoming(number(0), entry)
    builder.cbranch(builder.icmp_signed("<", number_of_slice, slices), body, after)

    builder.position_at_end(body)
    count = builder.sext(load(builder, _element(builder, counts, number_of_slice, 4), I32), I64)
    here = _element(builder, rows, number_of_slice, SLICE)
    first_index = _element(builder, indices, place, 1 if blocks else SLICE)
    first_value = _element(builder, values, place, SLICE * _entry_bytes(VALUE[kind]))
    if width == 1:
        _multiply_one_token(builder, kind, blocks, here, sums, tile, first_index, first_value, count)
    for first in range(0, SLICE, together) if width > 1 else ():
        group = range(first, first + together)
        targets = [
            _element(builder, sums, builder.zext(load(builder, here, I8, row), I64), 4 * width) for row in group
        ]
        _multiply_group(
            builder, kind, blocks, lanes, registers, half, group, targets, tile, first_index, first_value, count
        )
    number_of_slice.add_incoming(builder.add(number_of_slice, number(1)), builder.block)
    place.add_incoming(builder.add(place, count), builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    builder.ret_void()
    return function


def bitmask_rows(module: ir.Module, in_16_bits: bool) -> ir.Function:
    """The function that multiplies rows of an int8 weight, stored as a bitmask and values, with one token.

    Its arguments, all int64, are the addresses of: the bits of the first row, a uint64 for 64 columns; the values of
    all rows, int8; `starts`, int64 [rows], where those of each row begin; the token; the results, [rows]; then how
    many rows and how many uint64 a row has. The token is in 16 bits, first the higher bytes of all columns, then the
    lower ones, and the results are int64; or it is in fp32, and so are they. It goes on up to a multiple of 64
    columns. In fp32 an infinity or a NaN meets only what the bits name.
    """
    name = f"bitmask_rows_{'16_bits' if in_16_bits else 'fp32'}"
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 7), name)
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block())
    bits, values, starts, token, results, rows, words = function.args
    floats, integers = ir.VectorType(F32, 16), ir.VectorType(I32, 16)
    nothing = ir.Constant(integers, [0] * 16) if in_16_bits else zeros(F32, 16)
    lower = builder.add(token, builder.mul(words, number(64)))

    entry, head, row_body = builder.block, function.append_basic_block(), function.append_basic_block()
    word_head, word_body, row_end, after = (function.append_basic_block() for _ in range(4))
    builder.branch(head)
    builder.position_at_end(head)
    row = builder.phi(I64)
    row.add_incoming(number(0), entry)
    builder.cbranch(builder.icmp_signed("<", row, rows), row_body, after)

    builder.position_at_end(row_body)
    first = builder.add(values, load(builder, _element(builder, starts, row, 8), I64))
    row_bits = builder.add(bits, builder.mul(builder.mul(row, words), number(8)))
    builder.branch(word_head)
    builder.position_at_end(word_head)
    word, place = builder.phi(I64), builder.phi(I64)
    totals = [builder.phi(nothing.type) for _ in range(2 if in_16_bits else 4)]
    for phi, start in ((word, number(0)), (place, first), *((total, nothing) for total in totals)):
        phi.add_incoming(start, row_body)
    builder.cbranch(builder.icmp_signed("<", word, words), word_body, row_end)

    builder.position_at_end(word_body)
    mask = load(builder, _element(builder, row_bits, word, 8), I64)
    prefetch(builder, place, 1024)
    chosen, weights = _expand(builder, mask, place)
    if in_16_bits:
        for total, part in zip(totals, (token, lower), strict=True):
            x = load(builder, _element(builder, part, word, 64), ir.VectorType(I8, 64))
            total.add_incoming(_dot_of_bytes(builder, total, x, weights), word_body)
    else:
        for part, total in enumerate(totals):
            lanes = _indices(range(16 * part, 16 * part + 16))
            weight = builder.sitofp(builder.shuffle_vector(weights, weights, lanes), floats)
            x = load(builder, _element(builder, token, word, 256), floats, 64 * part)
            x = builder.select(builder.shuffle_vector(chosen, chosen, lanes), x, nothing)
            total.add_incoming(fma(builder, weight, x, total), word_body)
    word.add_incoming(builder.add(word, number(1)), word_body)
    place.add_incoming(builder.add(place, builder.ctpop(mask)), word_body)
    builder.branch(word_head)

    builder.position_at_end(row_end)
    if in_16_bits:
        higher, low = (builder.sext(_sum(builder, builder.add, total), I64) for total in totals)
        store(builder, builder.add(builder.shl(higher, number(8)), low), _element(builder, results, row, 8))
    else:
        total = builder.fadd(builder.fadd(*totals[:2]), builder.fadd(*totals[2:]))
        store(builder, _sum(builder, builder.fadd, total), _element(builder, results, row, 4))
    row.add_incoming(builder.add(row, number(1)), row_end)
    builder.branch(head)
    builder.position_at_end(after)
    builder.ret_void()
    return function


def _expand(builder: ir.IRBuilder, mask: ir.Value, values: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The bits of a word as a vector of booleans, and the values at an address spread over those that are set."""
    vector, booleans = ir.VectorType(I8, WORD), ir.VectorType(ir.IntType(1), WORD)
    name = "llvm.x86.avx512.mask.expand.v64i8"
    function = builder.module.globals.get(name) or ir.Function(
        builder.module, ir.FunctionType(vector, [vector, vector, booleans]), name
    )
    chosen, loaded = builder.bitcast(mask, booleans), load(builder, values, vector)
    # an empty piece of assembler keeps the load apart: AMD's processors take several times as long for both in one
    loaded = builder.asm(ir.FunctionType(vector, [vector]), "", "=v,0", [loaded], False)
    return chosen, builder.call(function, [loaded, ir.Constant(vector, [0] * WORD), chosen])


def _dot_of_bytes(builder: ir.IRBuilder, total: ir.Value, x: ir.Value, weights: ir.Value) -> ir.Value:
    """To each int32 of a vector the sum of four products of unsigned with signed bytes."""
    name = "llvm.x86.avx512.vpdpbusd.512"
    function = builder.module.globals.get(name) or ir.Function(
        builder.module, ir.FunctionType(total.type, [total.type, x.type, x.type]), name
    )
    return builder.call(function, [total, x, weights])


def _sum(builder: ir.IRBuilder, add: Callable, vector: ir.Value) -> ir.Value:
    """The sum of 16 lanes."""
    for half in (8, 4, 2, 1):
        vector = add(vector, builder.shuffle_vector(vector, vector, _indices([(i + half) % 16 for i in range(16)])))
    return builder.extract_element(vector, ir.Constant(I32, 0))


def _multiply_group(
    builder: ir.IRBuilder,
    kind: Kind,
    blocks: bool,
    lanes: int,
    registers: int,
    half: bool,
    group: range,
    targets: list[ir.Value],
    tile: ir.Value,
    first_index: ir.Value,
    first_value: ir.Value,
    count: ir.Value,
) -> None:
    """Some rows of a slice, with their sums in registers."""
    compute, entry_bytes = (F16, 2) if half else (F32, 4)
    vector, value_bytes = ir.VectorType(compute, lanes), _entry_bytes(VALUE[kind])
    before, head, body, after = builder.block, *(builder.append_basic_block() for _ in range(3))
    builder.branch(head)
    builder.position_at_end(head)
    i = builder.phi(I64)
    i.add_incoming(number(0), before)
    totals = [[builder.phi(vector) for _ in range(registers)] for _ in group]
    for total in (total for row_totals in totals for total in row_totals):
        total.add_incoming(zeros(compute, lanes), before)
    builder.cbranch(builder.icmp_signed("<", i, count), body, after)

    builder.position_at_end(body)
    index_at = _element(builder, first_index, i, 1 if blocks else SLICE)
    value_at = _element(builder, first_value, i, SLICE * value_bytes)
    prefetch(builder, value_at, 1536)
    prefetch(builder, index_at, 512)
    values = load(builder, value_at, ir.VectorType(VALUE[kind], len(group)), value_bytes * group.start)
    if not half:
        values = widen(builder, values, kind)

    def tokens_of(index: ir.Value) -> list[ir.Value]:
        tokens = _element(builder, tile, index, entry_bytes * lanes * registers)
        return [load(builder, tokens, vector, entry_bytes * lanes * register) for register in range(registers)]

    indices = _load_indices(builder, index_at, group, blocks)
    shared = tokens_of(indices[0]) if blocks else None
    for position in range(len(group)):
        value = splat(builder, values, position, lanes)
        for total, x in zip(totals[position], shared or tokens_of(indices[position]), strict=True):
            total.add_incoming(fma(builder, value, x, total), body)
    i.add_incoming(builder.add(i, number(1)), body)
    builder.branch(head)

    builder.position_at_end(after)
    for target, row_totals in zip(targets, totals, strict=True):
        for register, total in enumerate(row_totals):
            offset, wide = 4 * lanes * register, ir.VectorType(F32, lanes)
            if half:
                total = builder.fpext(total, wide)
            store(builder, builder.fadd(load(builder, target, wide, offset), total), target, offset)


def _multiply_one_token(
    builder: ir.IRBuilder,
    kind: Kind,
    blocks: bool,
    rows: ir.Value,
    sums: ir.Value,
    tile: ir.Value,
    first_index: ir.Value,
    first_value: ir.Value,
    count: ir.Value,
) -> None:
    """The eight rows of a slice times one token: a vector of their values times a vector of what they meet."""
    value_bytes, vector = _entry_bytes(VALUE[kind]), ir.VectorType(F32, SLICE)
    before, head, body, after = builder.block, *(builder.append_basic_block() for _ in range(3))
    builder.branch(head)
    builder.position_at_end(head)
    i, total = builder.phi(I64), builder.phi(vector)
    i.add_incoming(number(0), before)
    total.add_incoming(zeros(F32, SLICE), before)
    builder.cbranch(builder.icmp_signed("<", i, count), body, after)

    builder.position_at_end(body)
    index_at = _element(builder, first_index, i, 1 if blocks else SLICE)
    value_at = _element(builder, first_value, i, SLICE * value_bytes)
    prefetch(builder, value_at, 1536)
    prefetch(builder, index_at, 512)
    values = widen(builder, load(builder, value_at, ir.VectorType(VALUE[kind], SLICE)), kind)
    x = ir.Constant(vector, ir.Undefined)
    for row, index in enumerate(_load_indices(builder, index_at, range(SLICE), blocks)):
        x = builder.insert_element(x, load(builder, _element(builder, tile, index, 4), F32), ir.Constant(I32, row))
    if blocks:
        x = splat(builder, x, 0, SLICE)
    total.add_incoming(fma(builder, values, x, total), body)
    i.add_incoming(builder.add(i, number(1)), body)
    builder.branch(head)

    builder.position_at_end(after)
    for row in range(SLICE):
        target = _element(builder, sums, builder.zext(load(builder, rows, I8, row), I64), 4)
        added = builder.extract_element(total, ir.Constant(I32, row))
        store(builder, builder.fadd(load(builder, target, F32), added), target)


def _load_indices(builder: ir.IRBuilder, address: ir.Value, group: range, blocks: bool) -> list[ir.Value]:
    """The indices of some rows of a slice, in one load: the processor has fewer loads to spare than shifts."""
    if blocks:
        return [builder.zext(load(builder, address, I8), I64)]
    together = builder.zext(load(builder, address, ir.IntType(8 * len(group)), group.start), I64)
    return [builder.and_(builder.lshr(together, number(8 * i)), number(255)) for i in range(len(group))]


def _rows_together(registers: int) -> int:
    """How many rows of a slice are summed at once: enough sums to hide the latency of a product, as many as fit."""
    return min(SLICE, REGISTERS // 2 // registers)


def _element(builder: ir.IRBuilder, address: ir.Value, index: ir.Value, size: int) -> ir.Value:
    return builder.add(address, builder.mul(index, number(size)))


def _pointer(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type, offset: int) -> ir.Value:
    return builder.inttoptr(builder.add(address, number(offset)), kind.as_pointer())


def _entry_bytes(kind: ir.Type) -> int:
    entry = kind.element if isinstance(kind, ir.VectorType) else kind
    return {F16: 2, F32: 4}.get(entry) or entry.width // 8


def _indices(lanes: Sequence[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
