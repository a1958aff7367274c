"""Packed weights times activations: a linear layer, or a feed-forward block."""

from __future__ import annotations

import ctypes
import functools
import struct
import threading

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import threads
from .activations import ACTIVATIONS
from .emit import segment_code
from .layout import CHUNK, SLICE, WORD, Kind, Packed, retile
from .program import CALL, LAYER
from .target import HAS_HALF, LANES, WIDEST
from .worker import compile_worker

WORK_OF_A_THREAD = 200_000
"""Products that are worth another thread: about 20 µs."""
TOKENS_AT_ONCE = 1024
"""The panels of more would leave the caches."""
COUNTERS = 24
"""Bytes of counters for a block of tokens."""


@functools.cache
def machine_code() -> ctypes._CFuncPtr:
    """The worker. Compiling it takes seconds, once on a machine; the next process finds it in numba's cache."""
    with tqdm(total=1, desc="Compiling the sparse CPU kernels, once", delay=1.5) as progress:
        worker = compile_worker()
        progress.update()
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(worker.address)
    function.worker = worker  # its memory
    return function


class Layer:
    """For any number of tokens: y = W x + b, or y = W (act(G x) · (F x)), or y = W act(F x).

    Args:
        last: W and b.
        first: F, of a feed-forward block.
        gate: G, of a gated one.
        activation: a name in `activations.ACTIVATIONS`.
    """

    def __init__(
        self, last: Packed, first: Packed | None = None, gate: Packed | None = None, activation: str = "relu"
    ) -> None:
        if gate is not None:  # it shares a panel with first
            if (gate.kind is Kind.FP16) != (first.kind is Kind.FP16):
                raise ValueError(
                    f"The gate has values in {gate.kind.name}, the first layer in {first.kind.name}: expected FP16 in "
                    "both or in neither."
                )
            if gate.tile != first.tile:
                gate = retile(gate, first.tile)
            if (gate.bits is None) != (first.bits is None):
                gate, first = (weight._replace(bits=None) for weight in (gate, first))
        weights = [weight for weight in (first, gate, last) if weight is not None]
        record = np.zeros(1, LAYER)
        record["layers"], record["gated"] = 1 if first is None else 2, gate is not None
        record["activation"] = list(ACTIVATIONS).index(activation)
        record["first"], record["last"] = _describe(first or last), _describe(last)
        if gate is not None:
            record["gate"] = _describe(gate)
        self._made_from = last, first, gate, activation
        self._memory = weights, record
        self._address = record.ctypes.data
        self._out = last.shape[0]
        self._products = sum(weight.values.numel() for weight in weights)
        self._floats = sum(
            max(weight.tiles * (weight.tile + 1), WORD * weight.words)
            for weight in ((last,) if first is None else (first, last))
        )
        self._stage = LANES * CHUNK + WORD // 2 * max(weight.words for weight in weights)
        self._sums = max(last.chunk, 0 if first is None else (1 + (gate is not None)) * first.chunk)

    def __reduce__(self) -> tuple:
        return Layer, self._made_from  # the record holds addresses

    def __call__(self, x: Tensor) -> Tensor:
        """fp32 [tokens, in] to fp32 [tokens, out]."""
        x_stride, step = x.stride()
        if step != 1:
            x = x.contiguous()
            x_stride = x.stride(0)
        tokens = len(x)
        y = torch.empty(tokens, self._out, dtype=torch.float32)  # not the default dtype, which may be shorter
        source, target = x.data_ptr(), y.data_ptr()
        while tokens > TOKENS_AT_ONCE:
            self._compute(TOKENS_AT_ONCE, source, x_stride, target)
            source, target = source + 4 * TOKENS_AT_ONCE * x_stride, target + 4 * TOKENS_AT_ONCE * self._out
            tokens -= TOKENS_AT_ONCE
        if tokens:
            self._compute(tokens, source, x_stride, target)
        return y

    def _compute(self, tokens: int, x: int, x_stride: int, y: int) -> None:
        products, workers = tokens * self._products, 1
        if products > WORK_OF_A_THREAD:
            workers = min(torch.get_num_threads(), 1 + products // WORK_OF_A_THREAD)
        if tokens == 1:
            blocks, floats = 1, self._floats + workers * (self._sums + self._stage)
        else:  # at most: the last block may be narrower
            blocks = -(-tokens // WIDEST)
            floats = blocks * WIDEST * self._floats + workers * (WIDEST * self._sums + self._stage)
        space = getattr(_local, "space", None)
        if space is None or space.floats < floats or space.blocks < blocks:
            space = _more_space(space, floats, blocks)
        # three zeros for the counters of the first block
        _CALL.pack_into(space.call, 0, workers, 0, self._address, tokens, x, x_stride, y, space.scratch, 0, 0, 0)
        if blocks > 1:
            ctypes.memset(space.address + CALL.itemsize, 0, COUNTERS * blocks)
        if workers == 1:
            machine_code()(space.address)
        else:
            threads.run(machine_code(), space.address, workers)


class _Space:
    """Memory of one thread of Python for its calls: the record of a call, its counters, and what it computes with."""

    def __init__(self, floats: int, blocks: int) -> None:
        self.floats, self.blocks = floats, blocks
        self.call = ctypes.create_string_buffer(CALL.itemsize + COUNTERS * blocks)
        self.address = ctypes.addressof(self.call)
        self._buffer = torch.empty(floats + 16, dtype=torch.float32, device="cpu")
        self.scratch = -(-self._buffer.data_ptr() // 64) * 64


def _more_space(space: _Space | None, floats: int, blocks: int) -> _Space:
    """More memory than a thread has now."""
    if space is not None:
        floats, blocks = max(floats, space.floats), max(blocks, space.blocks)
    _local.space = _Space(floats, blocks)
    return _local.space


def _describe(weight: Packed) -> tuple[int, ...]:
    """A packed weight as the record that machine code reads."""
    parts = (weight.starts, weight.counts, weight.rows, weight.indices, weight.values, weight.scales, weight.bias)
    bitmask = (0, 0, 0, 0, 0)
    if weight.bits is not None:
        parts_of_it = (weight.bits, weight.bytes, weight.byte_starts, weight.byte_sums)
        bitmask = (weight.words, *(part.data_ptr() for part in parts_of_it))
    return (
        segment_code(weight.kind, weight.blocks, 1),
        *weight.shape,
        weight.tile,
        weight.tiles,
        weight.chunk,
        weight.chunks,
        HAS_HALF and weight.kind is Kind.FP16,
        1 if weight.blocks else SLICE,
        SLICE * weight.values.element_size(),
        *(part.data_ptr() for part in parts),
        *bitmask,
    )


_local = threading.local()
_CALL = struct.Struct(f"{len(CALL.names) + 3}q")
