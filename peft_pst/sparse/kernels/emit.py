"""The inner loops as LLVM instructions on vectors, which LLVM lowers to AVX-512, AVX2 or NEON.

Every function here reads and writes through addresses, int64, and trusts them: `worker.py`, which calls them, and
`layout.py`, which makes what they read, keep the bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir

from .layout import SLICE, WORD, Kind
from .target import CONVERTS_HALF, FEATURES, HAS_HALF, HAS_LOOKUP, LANES, REGISTERS, WIDTHS

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


def loop(
    builder: ir.IRBuilder,
    end: ir.Value,
    state: list[ir.Value],
    body: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
    step: int = 1,
) -> list[ir.Value]:
    """For i from 0 below `end`: state = body(i, state), by instructions; the state after that."""
    before, head, inside, after = builder.block, *(builder.append_basic_block() for _ in range(3))
    builder.branch(head)
    builder.position_at_end(head)
    phis = [builder.phi(value.type) for value in (end, *state)]
    for phi, value in zip(phis, (number(0), *state), strict=True):
        phi.add_incoming(value, before)
    i, *state = phis
    builder.cbranch(builder.icmp_signed("<", i, end), inside, after)

    builder.position_at_end(inside)
    changed = body(i, state)
    for phi, value in zip(phis, (builder.add(i, number(step)), *changed), strict=True):
        phi.add_incoming(value, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return state


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

    looks_up = width == 1 and HAS_LOOKUP and not blocks
    table = [load(builder, tile, ir.VectorType(F32, LANES), 64 * part) for part in range(16)] if looks_up else []

    def multiply_slice(slice_: ir.Value, places: list[ir.Value]) -> list[ir.Value]:
        (place,) = places
        count = builder.sext(load(builder, _element(builder, counts, slice_, 4), I32), I64)
        here = _element(builder, rows, slice_, SLICE)
        first_index = _element(builder, indices, place, 1 if blocks else SLICE)
        first_value = _element(builder, values, place, SLICE * _entry_bytes(VALUE[kind]))
        if width == 1:
            if looks_up:
                total = _look_up_one_token(builder, kind, table, first_index, first_value, count)
            else:
                total = _gather_one_token(builder, kind, blocks, tile, first_index, first_value, count)
            _scatter(builder, total, here, sums)
        for first in range(0, SLICE, together) if width > 1 else ():
            group = range(first, first + together)
            targets = [
                _element(builder, sums, builder.zext(load(builder, here, I8, row), I64), 4 * width) for row in group
            ]
            _multiply_group(
                builder, kind, blocks, lanes, registers, half, group, targets, tile, first_index, first_value, count
            )
        return [builder.add(place, count)]

    loop(builder, slices, [number(0)], multiply_slice)
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

    def multiply_row(row: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        first = builder.add(values, load(builder, _element(builder, starts, row, 8), I64))
        row_bits = builder.add(bits, builder.mul(builder.mul(row, words), number(8)))

        def multiply_word(word: ir.Value, state: list[ir.Value]) -> list[ir.Value]:
            place, *totals = state
            mask = load(builder, _element(builder, row_bits, word, 8), I64)
            prefetch(builder, place, 1024)
            chosen, weights = _expand(builder, mask, place)
            if in_16_bits:
                parts = [
                    load(builder, _element(builder, part, word, 64), ir.VectorType(I8, 64)) for part in (token, lower)
                ]
                totals = [_dot_of_bytes(builder, total, x, weights) for total, x in zip(totals, parts, strict=True)]
            else:
                totals = [multiply_part(word, chosen, weights, *part) for part in enumerate(totals)]
            return [builder.add(place, builder.ctpop(mask)), *totals]

        _, *totals = loop(builder, words, [first, *[nothing] * (2 if in_16_bits else 4)], multiply_word)
        if in_16_bits:
            higher, low = (builder.sext(_sum(builder, builder.add, total), I64) for total in totals)
            store(builder, builder.add(builder.shl(higher, number(8)), low), _element(builder, results, row, 8))
        else:
            total = builder.fadd(builder.fadd(*totals[:2]), builder.fadd(*totals[2:]))
            store(builder, _sum(builder, builder.fadd, total), _element(builder, results, row, 4))
        return []

    def multiply_part(word: ir.Value, chosen: ir.Value, weights: ir.Value, part: int, total: ir.Value) -> ir.Value:
        lanes = _indices(range(16 * part, 16 * part + 16))
        weight = builder.sitofp(builder.shuffle_vector(weights, weights, lanes), floats)
        x = load(builder, _element(builder, token, word, 256), floats, 64 * part)
        x = builder.select(builder.shuffle_vector(chosen, chosen, lanes), x, nothing)
        return fma(builder, weight, x, total)

    loop(builder, rows, [], multiply_row)
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

    def multiply(i: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
        index_at, value_at = _step(builder, first_index, first_value, i, 1 if blocks else SLICE, SLICE * value_bytes)
        values = load(builder, value_at, ir.VectorType(VALUE[kind], len(group)), value_bytes * group.start)
        if not half:
            values = widen(builder, values, kind)
        indices = _load_indices(builder, index_at, group, blocks)
        shared = tokens_of(indices[0]) if blocks else None
        sums = []
        for position in range(len(group)):
            value = splat(builder, values, position, lanes)
            for x in shared or tokens_of(indices[position]):
                sums.append(fma(builder, value, x, totals[len(sums)]))
        return sums

    def tokens_of(index: ir.Value) -> list[ir.Value]:
        tokens = _element(builder, tile, index, entry_bytes * lanes * registers)
        return [load(builder, tokens, vector, entry_bytes * lanes * register) for register in range(registers)]

    totals = iter(loop(builder, count, [zeros(compute, lanes)] * len(group) * registers, multiply))
    wide = ir.VectorType(F32, lanes)
    for target in targets:
        for register in range(registers):
            offset, total = 4 * lanes * register, next(totals)
            if half:
                total = builder.fpext(total, wide)
            store(builder, builder.fadd(load(builder, target, wide, offset), total), target, offset)


def _gather_one_token(
    builder: ir.IRBuilder,
    kind: Kind,
    blocks: bool,
    tile: ir.Value,
    first_index: ir.Value,
    first_value: ir.Value,
    count: ir.Value,
) -> ir.Value:
    """The eight rows of a slice times one token: a vector of their values times a vector of what they meet."""
    value_bytes, vector = _entry_bytes(VALUE[kind]), ir.VectorType(F32, SLICE)

    def multiply(i: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
        index_at, value_at = _step(builder, first_index, first_value, i, 1 if blocks else SLICE, SLICE * value_bytes)
        values = widen(builder, load(builder, value_at, ir.VectorType(VALUE[kind], SLICE)), kind)
        x = ir.Constant(vector, ir.Undefined)
        for row, index in enumerate(_load_indices(builder, index_at, range(SLICE), blocks)):
            x = builder.insert_element(x, load(builder, _element(builder, tile, index, 4), F32), ir.Constant(I32, row))
        if blocks:
            x = splat(builder, x, 0, SLICE)
        return [fma(builder, values, x, totals[0])]

    return loop(builder, count, [zeros(F32, SLICE)], multiply)[0]


def _look_up_one_token(
    builder: ir.IRBuilder,
    kind: Kind,
    table: list[ir.Value],
    first_index: ir.Value,
    first_value: ir.Value,
    count: ir.Value,
) -> ir.Value:
    """The same for a tile that is in sixteen registers: two values of each row at a time, without a load for each."""
    lanes, value_bytes = 2 * SLICE, _entry_bytes(VALUE[kind])
    booleans = ir.VectorType(ir.IntType(1), lanes)
    both, one = (ir.Constant(booleans, [lane < count for lane in range(lanes)]) for count in (lanes, SLICE))

    def multiply(i: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
        index_at, value_at = _step(builder, first_index, first_value, i, SLICE, SLICE * value_bytes)
        # the last value of a row may be alone: behind it lies what is not this slice's, or nothing
        here = builder.select(builder.icmp_signed("<", builder.add(i, number(1)), count), both, one)
        values = widen(builder, _load_some(builder, value_at, ir.VectorType(VALUE[kind], lanes), here), kind)
        indices = builder.zext(
            _load_some(builder, index_at, ir.VectorType(I8, lanes), here), ir.VectorType(I32, lanes)
        )
        added = fma(builder, values, _look_up(builder, table, indices), totals[0])
        return [builder.select(here, added, totals[0])]

    (total,) = loop(builder, count, [zeros(F32, lanes)], multiply, step=2)
    low, high = (builder.shuffle_vector(total, total, _indices(range(i, i + SLICE))) for i in (0, SLICE))
    return builder.fadd(low, high)


def _look_up(builder: ir.IRBuilder, table: list[ir.Value], indices: ir.Value) -> ir.Value:
    """What a table of 256 floats has at the indices: from pairs of its registers, then the one that each bit names."""
    vector, bit = table[0].type, 2 * LANES
    name = "llvm.x86.avx512.vpermi2var.ps.512"
    function = builder.module.globals.get(name) or ir.Function(
        builder.module, ir.FunctionType(vector, [vector, indices.type, vector]), name
    )
    found = [builder.call(function, [low, indices, high]) for low, high in zip(table[::2], table[1::2], strict=True)]
    while len(found) > 1:
        bits = builder.and_(indices, ir.Constant(indices.type, [bit] * LANES))
        is_set = builder.icmp_unsigned("!=", bits, ir.Constant(indices.type, [0] * LANES))
        found = [builder.select(is_set, high, low) for low, high in zip(found[::2], found[1::2], strict=True)]
        bit *= 2
    return found[0]


def _load_some(builder: ir.IRBuilder, address: ir.Value, vector: ir.Type, which: ir.Value) -> ir.Value:
    """A vector of which only some entries are read; the others are zero."""
    entry = vector.element
    name = f"llvm.masked.load.v{vector.count}{'f32' if entry == F32 else 'f16' if entry == F16 else f'i{entry.width}'}"
    pointer = vector.as_pointer()
    function = builder.module.globals.get(f"{name}.p0") or ir.Function(
        builder.module, ir.FunctionType(vector, [pointer, I32, which.type, vector]), f"{name}.p0"
    )
    nothing = ir.Constant(vector, [0.0 if entry in (F16, F32) else 0] * vector.count)
    arguments = [builder.inttoptr(address, pointer), ir.Constant(I32, _entry_bytes(vector)), which, nothing]
    return builder.call(function, arguments)


def _scatter(builder: ir.IRBuilder, total: ir.Value, rows: ir.Value, sums: ir.Value) -> None:
    """Add the sums of a slice to those of its rows."""
    for row in range(SLICE):
        target = _element(builder, sums, builder.zext(load(builder, rows, I8, row), I64), 4)
        added = builder.extract_element(total, ir.Constant(I32, row))
        store(builder, builder.fadd(load(builder, target, F32), added), target)


def _step(
    builder: ir.IRBuilder, indices: ir.Value, values: ir.Value, i: ir.Value, index_bytes: int, value_bytes: int
) -> list[ir.Value]:
    """Where the indices and the values of a step lie; has the processor fetch those of later ones."""
    addresses = [_element(builder, indices, i, index_bytes), _element(builder, values, i, value_bytes)]
    for address, ahead in zip(addresses, (512, 1536), strict=True):
        prefetch(builder, address, ahead)
    return addresses


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
