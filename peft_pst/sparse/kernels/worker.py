"""The machine code that computes a program: what one thread does, from activations to outputs.

A program is one sparse linear layer, or a feed-forward block of two or three. Its tokens are cut into blocks. For each
block the tasks are, in this order: turn the activations into a panel [in, tokens], tile by tile; multiply a chunk of
hidden rows and activate it, into a second panel; multiply a chunk of output rows.

Each thread begins with another block, so that a panel is read by the core that wrote it, and helps with the others
when that one has no more tasks. Threads in a block take its tasks from one counter, and before a task wait for those
that it needs: they were taken earlier, so they are under way.
"""

from __future__ import annotations

import inspect
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, from_dtype, njit, types
from numba.extending import intrinsic

from . import activations, emit, layout, program, target
from .emit import F16, F32, I8, I32, I64
from .layout import CHUNK, SLICE, WORD
from .target import HAS_BITMASK, HAS_HALF, LANES, WIDEST, WIDTHS

ADDRESS = types.int64
CALL_RECORD, LAYER_RECORD = from_dtype(program.CALL), from_dtype(program.LAYER)
CALL_BYTES, LAYER_BYTES = program.CALL.itemsize, program.LAYER.itemsize
CONFLICT = 2048
"""Rows that are a multiple of so many bytes apart compete for the same few lines of the first cache: a square of them
is moved by way of a stage."""
STAGE = LANES * CHUNK
"""Floats of a stage."""
STAGE_STRIDE = 4 * CHUNK
VECTOR = ir.VectorType(F32, LANES)


def _machine(result: types.Type, *arguments: types.Type) -> Callable[[Callable], Any]:
    """Makes a function for machine code from one that emits its instructions, emit(builder, *arguments)."""

    def decorate(emit_body: Callable) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list[ir.Value]) -> ir.Value:
            made = emit_body(builder, *values)
            return context.get_dummy_value() if made is None else made

        def function(typing: Any, *_: Any) -> Any:
            return result(*arguments), generate

        # numba wants every argument by name, and finds the context in the place of the builder
        function.__signature__ = inspect.signature(emit_body)
        return intrinsic(function)

    return decorate


@_machine(types.int64, ADDRESS)
def take(builder, address):
    """Add one to a counter that all threads see; what it was before."""
    pointer = builder.inttoptr(address, I64.as_pointer())
    return builder.atomic_rmw("add", pointer, emit.number(1), "acq_rel")


@_machine(types.int64, ADDRESS)
def look(builder, address):
    """A counter that other threads add to."""
    return builder.load_atomic(builder.inttoptr(address, I64.as_pointer()), "acquire", 8)


@_machine(types.int64, ADDRESS)
def load_int64(builder, address):
    return emit.load(builder, address, I64)


@_machine(types.CPointer(types.float32), ADDRESS)
def floats(builder, address):
    return builder.inttoptr(address, F32.as_pointer())


@_machine(types.CPointer(CALL_RECORD), ADDRESS)
def call_at(builder, address):
    return builder.inttoptr(address, ir.ArrayType(I8, CALL_BYTES).as_pointer())


@_machine(types.CPointer(LAYER_RECORD), ADDRESS)
def layer_at(builder, address):
    return builder.inttoptr(address, ir.ArrayType(I8, LAYER_BYTES).as_pointer())


@_machine(types.CPointer(types.int32), ADDRESS)
def integers(builder, address):
    return builder.inttoptr(address, I32.as_pointer())


@_machine(types.CPointer(types.int64), ADDRESS)
def long_integers(builder, address):
    return builder.inttoptr(address, I64.as_pointer())


@_machine(types.CPointer(types.uint8), ADDRESS)
def unsigned_bytes(builder, address):
    return builder.inttoptr(address, I8.as_pointer())


@_machine(types.float32, types.int32)
def as_float(builder, bits):
    return builder.bitcast(bits, F32)


@_machine(types.none, ADDRESS, types.float32)
def store_half(builder, address, value):
    if not HAS_HALF:  # no panel is in fp16 then, and not every processor can round to it
        return
    emit.store(builder, builder.fptrunc(value, F16), address)


@_machine(types.none, ADDRESS, ADDRESS)
def halve_vector(builder, source, target):
    """A vector of fp32 as fp16."""
    if not HAS_HALF:
        return
    emit.store(builder, builder.fptrunc(emit.load(builder, source, VECTOR), ir.VectorType(F16, LANES)), target)


@_machine(types.none, ADDRESS, types.int64, ADDRESS, types.int64)
def transpose(builder, source, stride, target, target_stride):
    """A square of LANES x LANES floats; strides in bytes."""
    for row, vector in enumerate(_transposed(builder, source, stride)):
        emit.store(builder, vector, builder.add(target, builder.mul(target_stride, emit.number(row))))


@_machine(types.none, ADDRESS, types.int64, ADDRESS, types.int64)
def transpose_to_half(builder, source, stride, target, target_stride):
    """The same into fp16."""
    if not HAS_HALF:
        return
    for row, vector in enumerate(_transposed(builder, source, stride)):
        half = builder.fptrunc(vector, ir.VectorType(F16, LANES))
        emit.store(builder, half, builder.add(target, builder.mul(target_stride, emit.number(row))))


@_machine(types.none, ADDRESS, types.int64, ADDRESS, types.int64, ADDRESS, ADDRESS)
def transpose_affine(builder, source, stride, target, target_stride, scales, bias):
    """The same, and each column times a scale, plus a bias."""
    scale, offset = (emit.load(builder, address, VECTOR) for address in (scales, bias))
    for row, vector in enumerate(_transposed(builder, source, stride)):
        vector = emit.fma(builder, vector, scale, offset)
        emit.store(builder, vector, builder.add(target, builder.mul(target_stride, emit.number(row))))


@_machine(types.none, *[types.int64] * 8)
def multiply_segment(builder, code, tile, indices, values, counts, rows, slices, sums):
    """See `emit.segment`."""
    emit.call_segment(builder, code, (tile, indices, values, counts, rows, slices, sums))


@_machine(types.none, types.int64, *[ADDRESS] * 5, types.int64, types.int64)
def multiply_bitmask(builder, in_16_bits, bits, values, starts, token, results, rows, words):
    """See `emit.bitmask_rows`."""
    if not HAS_BITMASK:  # no weight has a bitmask then
        return
    arguments = (bits, values, starts, token, results, rows, words)
    with builder.if_else(builder.trunc(in_16_bits, ir.IntType(1))) as branches:
        for branch, kind in zip(branches, (True, False), strict=True):
            with branch:
                builder.call(emit.bitmask_rows(builder.module, kind), arguments)


@_machine(types.none, types.int64, ADDRESS)
def activate_vector(builder, activation, address):
    """A vector of fp32, in place."""
    otherwise, after = builder.append_basic_block(), builder.append_basic_block()
    switch = builder.switch(activation, otherwise)
    for place, function in enumerate(activations.ACTIVATIONS.values()):
        case = builder.append_basic_block()
        switch.add_case(emit.number(place), case)
        builder.position_at_end(case)
        emit.store(builder, function(builder, emit.load(builder, address, VECTOR)), address)
        builder.branch(after)
    builder.position_at_end(otherwise)
    builder.unreachable()
    builder.position_at_end(after)


def _transposed(builder: ir.IRBuilder, source: ir.Value, stride: ir.Value) -> list[ir.Value]:
    rows = [
        emit.load(builder, builder.add(source, builder.mul(stride, emit.number(row))), VECTOR) for row in range(LANES)
    ]
    return emit.transpose(builder, rows)


@njit(error_model="numpy")
def smallest_width(tokens):
    """The narrowest panel that holds so many tokens."""
    for width in WIDTHS:
        if width >= tokens:
            return width
    return WIDEST


@njit(error_model="numpy")
def _entry_bytes(weight, width):
    """Of a panel that a weight is multiplied with."""
    return 2 if weight.half and width >= LANES else 4


@njit(error_model="numpy")
def _in_order(weight, width):
    """Whether a panel is one token, with no rows of zeros between its tiles but zeros up to a whole word."""
    return width == 1 and weight.words > 0


@njit(error_model="numpy")
def _panel_bytes(weight, width):
    """Of a panel: the columns of each tile, and a row of zeros behind them."""
    if _in_order(weight, width):
        return 4 * WORD * weight.words
    return weight.tiles * (weight.tile + 1) * width * _entry_bytes(weight, width)


@njit(error_model="numpy")
def _fill_zero(address, count):
    values = carray(floats(address), count)
    for i in range(count):
        values[i] = 0


@njit(error_model="numpy")
def _copy(source, count, target, step, half):
    """`count` floats one after the other to places `step` entries apart."""
    values = carray(floats(source), count)
    if half:
        for i in range(count):
            store_half(target + 2 * i * step, values[i])
    elif step == 1:
        entries = carray(floats(target), count)
        for i in range(count):
            entries[i] = values[i]
    else:
        entries = carray(floats(target), count * step)
        for i in range(count):
            entries[i * step] = values[i]


@njit(error_model="numpy")
def _fill_column(count, target, step, half):
    """The same with zeros."""
    if half:
        for i in range(count):
            store_half(target + 2 * i * step, np.float32(0))
    else:
        entries = carray(floats(target), count * step)
        for i in range(count):
            entries[i * step] = 0


@njit(error_model="numpy")
def _pack(call, weight, panel, block, tile, width, stage):
    """Write a tile of the panel of activations."""
    entry = _entry_bytes(weight, width)
    half, row_bytes = entry == 2, width * entry
    stride = 4 * call.x_stride
    x = call.x + block * WIDEST * stride + 4 * tile * weight.tile
    if _in_order(weight, width):
        first = tile * weight.tile
        _copy(x, min(weight.tile, weight.size - first), panel + 4 * first, 1, False)
        if tile == 0:
            _fill_zero(panel + 4 * weight.size, WORD * weight.words - weight.size)
        return
    panel += tile * (weight.tile + 1) * row_bytes
    tokens = min(width, call.tokens - block * WIDEST)
    columns = min(weight.tile, weight.size - tile * weight.tile)
    _fill_zero(panel + weight.tile * row_bytes, row_bytes // 4)
    step = LANES if width >= LANES else width
    for token in range(0, width, step):
        column = 0
        if token + LANES <= tokens:
            source, source_stride = x + token * stride, stride
            if stride % CONFLICT == 0:
                source, source_stride = stage, STAGE_STRIDE
                for t in range(LANES):
                    _copy(x + (token + t) * stride, columns, stage + t * source_stride, 1, False)
            while column + LANES <= columns:
                target = panel + column * row_bytes + token * entry
                if half:
                    transpose_to_half(source + 4 * column, source_stride, target, row_bytes)
                else:
                    transpose(source + 4 * column, source_stride, target, row_bytes)
                column += LANES
        for t in range(token, token + step):
            target = panel + column * row_bytes + t * entry
            if t < tokens:
                _copy(x + t * stride + 4 * column, columns - column, target, width, half)
            else:
                _fill_column(columns - column, target, width, half)


@njit(error_model="numpy")
def _in_16_bits(token, count, target, columns):
    """Write a token in 16 bits, 32768 for zero, the higher bytes before the lower ones; its scale, 0 if not finite."""
    bits, values = carray(integers(token), count), carray(floats(token), count)
    largest = np.int32(0)
    for i in range(count):
        largest = max(largest, bits[i] & np.int32(0x7FFFFFFF))
    if largest >= np.int32(0x7F800000):
        return np.float32(0)
    scale = max(as_float(largest) / np.float32(32767), np.float32(1e-37))
    inverse = np.float32(1) / scale
    higher, lower = carray(unsigned_bytes(target), columns), carray(unsigned_bytes(target + columns), columns)
    for i in range(count):
        step = np.int32(values[i] * inverse + np.float32(32768.5))
        higher[i], lower[i] = step >> 8, step & 255
    return scale


@njit(error_model="numpy")
def _multiply_token(weight, token, chunk, sums, stage):
    """A chunk of rows of a weight that has a bitmask times one token, in 16 bits if all of it is finite."""
    first = chunk * weight.chunk
    rows, columns = min(weight.chunk, weight.out - first), WORD * weight.words
    scale = _in_16_bits(token, weight.size, stage + 8 * CHUNK, columns)
    exact = scale == 0
    multiply_bitmask(
        0 if exact else 1,
        weight.bits + 8 * first * weight.words,
        weight.bytes,
        weight.byte_starts + 8 * first,
        token if exact else stage + 8 * CHUNK,
        sums if exact else stage,
        rows,
        weight.words,
    )
    if not exact:
        results, values = carray(long_integers(stage), rows), carray(floats(sums), rows)
        row_sums = carray(long_integers(weight.byte_sums + 8 * first), rows)
        for row in range(rows):
            values[row] = np.float32(results[row] - 32768 * row_sums[row]) * scale


@njit(error_model="numpy")
def _multiply(weight, panel, width, chunk, sums, stage):
    """A chunk of rows times a panel, into sums, fp32 [chunk, width]."""
    if _in_order(weight, width):
        _multiply_token(weight, panel, chunk, sums, stage)
        return
    _fill_zero(sums, weight.chunk * width)
    slices = weight.chunk // SLICE
    tile_bytes = (weight.tile + 1) * width * _entry_bytes(weight, width)
    for tile in range(weight.tiles):
        segment = chunk * weight.tiles + tile
        start = load_int64(weight.starts + 8 * segment)
        multiply_segment(
            weight.code + width - 1,
            panel + tile * tile_bytes,
            weight.indices + start * weight.index_bytes,
            weight.values + start * weight.value_bytes,
            weight.counts + 4 * segment * slices,
            weight.rows + segment * weight.chunk,
            slices,
            sums,
        )


@njit(error_model="numpy")
def _affine(weight, width, chunk, sums):
    """Each row of sums times its scale, plus its bias."""
    values = carray(floats(sums), weight.chunk * width)
    scales = carray(floats(weight.scales + 4 * chunk * weight.chunk), weight.chunk)
    bias = carray(floats(weight.bias + 4 * chunk * weight.chunk), weight.chunk)
    if width == 1:
        for row in range(weight.chunk):
            values[row] = values[row] * scales[row] + bias[row]
    else:
        for row in range(weight.chunk):
            scale, offset = scales[row], bias[row]
            for i in range(row * width, (row + 1) * width):
                values[i] = values[i] * scale + offset


@njit(error_model="numpy")
def _hidden(layer, panel, hidden, chunk, width, sums, stage):
    """A chunk of hidden rows, activated, into the hidden panel."""
    first, last = layer.first, layer.last
    count = first.chunk * width
    _multiply(first, panel, width, chunk, sums, stage)
    _affine(first, width, chunk, sums)
    values = carray(floats(sums), count)
    if layer.gated:
        gate_sums = sums + 4 * count
        _multiply(layer.gate, panel, width, chunk, gate_sums, stage)
        _affine(layer.gate, width, chunk, gate_sums)
        for i in range(0, count, LANES):
            activate_vector(layer.activation, gate_sums + 4 * i)
        gates = carray(floats(gate_sums), count)
        for i in range(count):
            values[i] *= gates[i]
    else:
        for i in range(0, count, LANES):
            activate_vector(layer.activation, sums + 4 * i)

    half = _entry_bytes(last, width) == 2
    row_bytes = width * _entry_bytes(last, width)
    in_order = _in_order(last, width)
    if chunk == 0 and in_order:
        _fill_zero(hidden + 4 * last.size, WORD * last.words - last.size)
    elif chunk == 0:
        for tile in range(last.tiles):
            _fill_zero(hidden + (tile * (last.tile + 1) + last.tile) * row_bytes, row_bytes // 4)
    for row in range(min(first.chunk, first.out - chunk * first.chunk)):
        column = chunk * first.chunk + row
        target = hidden + (column + (0 if in_order else column // last.tile)) * row_bytes
        if half:
            for i in range(0, width, LANES):
                halve_vector(sums + 4 * (row * width + i), target + 2 * i)
        else:
            entries = carray(floats(target), width)
            for i in range(width):
                entries[i] = values[row * width + i]


@njit(error_model="numpy")
def _output(call, weight, panel, block, chunk, width, sums, stage):
    """A chunk of output rows, into y."""
    _multiply(weight, panel, width, chunk, sums, stage)
    first = chunk * weight.chunk
    rows = min(weight.chunk, weight.out - first)
    tokens = min(width, call.tokens - block * WIDEST)
    stride = 4 * weight.out
    y = call.y + block * WIDEST * stride + 4 * first
    values = carray(floats(sums), weight.chunk * width)
    scales = carray(floats(weight.scales + 4 * first), weight.chunk)
    bias = carray(floats(weight.bias + 4 * first), weight.chunk)
    staged = stride % CONFLICT == 0
    for token in range(0, tokens, LANES):
        row = 0
        if token + LANES <= tokens:
            target, target_stride = (stage, STAGE_STRIDE) if staged else (y + token * stride, stride)
            while row + LANES <= rows:
                transpose_affine(
                    sums + 4 * (row * width + token),
                    4 * width,
                    target + 4 * row,
                    target_stride,
                    weight.scales + 4 * (first + row),
                    weight.bias + 4 * (first + row),
                )
                row += LANES
            if staged:
                for t in range(LANES):
                    _copy(stage + t * target_stride, row, y + (token + t) * stride, 1, False)
        for t in range(token, min(token + LANES, tokens)):
            outputs = carray(floats(y + t * stride), rows)
            if width == 1:
                for j in range(rows):
                    outputs[j] = values[j] * scales[j] + bias[j]
            else:
                for j in range(row, rows):
                    outputs[j] = values[j * width + t] * scales[j] + bias[j]


@njit(error_model="numpy")
def _run(call, layer, address):
    first, last = layer.first, layer.last
    feed_forward = layer.layers == 2
    packs, hiddens, outputs = first.tiles, first.chunks if feed_forward else 0, last.chunks
    tasks = packs + hiddens + outputs
    blocks = (call.tokens + WIDEST - 1) // WIDEST
    last_width = smallest_width(call.tokens - (blocks - 1) * WIDEST)
    panel_bytes = _panel_bytes(first, WIDEST)
    hidden_bytes = _panel_bytes(last, WIDEST) if feed_forward else 0
    widest = WIDEST if blocks > 1 else last_width
    panels = call.scratch
    hiddens_panels = panels + (blocks - 1) * panel_bytes + _panel_bytes(first, last_width)
    all_sums = hiddens_panels
    if feed_forward:
        all_sums += (blocks - 1) * hidden_bytes + _panel_bytes(last, last_width)
    sums_rows = max(last.chunk, first.chunk * (1 + layer.gated) if feed_forward else 0)
    stage_floats = STAGE + WORD // 2 * max(first.words, last.words)
    thread = take(address + 8)
    stage = all_sums + thread * 4 * (stage_floats + widest * sums_rows)
    sums = stage + 4 * stage_floats
    home = thread * blocks // call.threads
    for nth in range(blocks):
        block = (home + nth) % blocks
        width = WIDEST if block < blocks - 1 else last_width
        taken = address + CALL_BYTES + 24 * block
        packed, activated = taken + 8, taken + 16
        panel, hidden = panels + block * panel_bytes, hiddens_panels + block * hidden_bytes
        task = take(taken)
        while task < tasks:
            if task < packs:
                _pack(call, first, panel, block, task, width, stage)
                take(packed)
            else:
                while look(packed) < packs:
                    pass
                if task < packs + hiddens:
                    _hidden(layer, panel, hidden, task - packs, width, sums, stage)
                    take(activated)
                else:
                    while look(activated) < hiddens:
                        pass
                    source = hidden if feed_forward else panel
                    _output(call, last, source, block, task - packs - hiddens, width, sums, stage)
            task = take(taken)


def compile_worker() -> Any:
    """The worker as a C callback of one argument, the address of a program; from numba's cache if it is there, and
    compiled for this process alone where numba can write none."""
    # numba looks only at this file to see whether what it cached is old
    stamp = zlib.crc32(b"".join(Path(m.__file__).read_bytes() for m in (emit, layout, program, activations, target)))

    def worker(address):
        stamp  # noqa: B018
        call = carray(call_at(address), 1)[0]
        _run(call, carray(layer_at(call.layer), 1)[0], address)

    try:
        return cfunc(types.void(ADDRESS), cache=True, error_model="numpy")(worker)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        warnings.warn(
            "Numba found no folder to keep the compiled kernels in, so every process compiles them again, for about "
            "ten seconds: let the environment variable NUMBA_CACHE_DIR name one that can be written to.",
            stacklevel=2,
        )
        return cfunc(types.void(ADDRESS), error_model="numpy")(worker)
