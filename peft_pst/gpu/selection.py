"""The exact selection on a GPU: a radix selection of the threshold, digit by digit, and ties in row-major order.

Nothing waits for the device, and nothing as large as the importance is stored beside it: the histogram of a digit is
256 counts, and where entries tie, one count for each 128 of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import device_of, num_programs
from .tiles import ordered_keys

BITS = 8
"""Of a digit. A warp counts the digits of its entries bin by bin: fewer, larger ones would take more instructions, and
more registers, than the passes that they save."""
SHIFTS = tuple(range(32 - BITS, -1, -BITS))
"""Of a key of 32 bits to its digits, from the top."""
BLOCK_N, BLOCK_K = 32, 128


def keep_largest(importance: Tensor, num_pruned: int | Tensor) -> Tensor:
    """Like `patterns.keep_largest`, for fp32; an int64 scalar `num_pruned` is on the device of the importance."""
    flat = importance.contiguous().view(-1)
    keep = torch.empty(flat.shape, dtype=torch.bool, device=flat.device)
    shape = (triton.cdiv(flat.numel(), BLOCK_K), BLOCK_K)  # row-major order is the same in any shape
    with device_of(flat):
        threshold = Threshold(shape, num_pruned, flat.device)
        for histogram, shift in threshold.digits():
            _count_digits[(num_programs(shape, BLOCK_N, BLOCK_K),)](
                flat, histogram, threshold.state, flat.numel(), shape[0], shift, BITS, BLOCK_N, BLOCK_K
            )
            threshold.narrow(histogram)
        grid = (triton.cdiv(shape[0], BLOCK_N),)
        _count_ties[grid](flat, threshold.ties, threshold.state, flat.numel(), shape[0], BLOCK_N, BLOCK_K)
        before = threshold.ties_before()
        _write[grid](flat, keep, before, threshold.state, flat.numel(), shape[0], BLOCK_N, BLOCK_K)
    return keep.view(importance.shape)


class Threshold:
    """The key of the `num_pruned`-th smallest entry of a matrix [n, k], found on the device.

    `state`, int64 [3]: the digits that are known; how many of the entries that have them are pruned; how many entries
    have them. At the end these are the key, how many entries that tie with it are pruned, and how many tie.
    """

    def __init__(self, shape: tuple[int, int], num_pruned: int | Tensor, device: torch.device) -> None:
        self.state = torch.zeros(3, dtype=torch.int64, device=device)
        self.state[1] = num_pruned
        self.histograms = torch.zeros(len(SHIFTS), 1 << BITS, dtype=torch.int32, device=device)
        self.ties = torch.empty(shape[0], triton.cdiv(shape[1], BLOCK_K), dtype=torch.int32, device=device)

    def digits(self) -> zip[tuple[Tensor, int]]:
        """A histogram, empty, and the shift of the digit that it is to count."""
        return zip(self.histograms, SHIFTS, strict=True)

    def narrow(self, histogram: Tensor) -> None:
        """Add the digit that a histogram has counted to those that are known."""
        _narrow[(1,)](histogram, self.state, BITS)

    def ties_before(self) -> Tensor:
        """How many entries tie in what lies before each of the blocks of 128 that `ties` has counted."""
        counts = self.ties.view(-1)
        return counts.cumsum(0, dtype=torch.int32) - counts


@triton.jit
def _narrow(histogram, state, BITS: tl.constexpr):
    counts = tl.load(histogram + tl.arange(0, 1 << BITS))
    wanted = tl.load(state + 1)
    below = tl.cumsum(counts, 0) < wanted
    digit = tl.sum(below.to(tl.int64), 0)
    tl.store(state + 2, tl.load(histogram + digit).to(tl.int64))
    tl.store(state, (tl.load(state) << BITS) + digit)
    tl.store(state + 1, wanted - tl.sum(tl.where(below, counts, 0), 0))


@triton.jit
def count_tile(total, keys, inside, state, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """`total`, and the histogram of a digit over the entries of a tile that have the digits before it."""
    digits = ((keys >> SHIFT) & ((1 << BITS) - 1)).to(tl.int32).reshape(keys.numel)
    if SHIFT + BITS == 32:
        total += tl.histogram(digits, 1 << BITS, mask=inside.reshape(keys.numel))
    else:
        counted = inside & ((keys >> (SHIFT + BITS)) == tl.load(state).to(tl.uint32))
        if tl.max(tl.max(counted.to(tl.int32), 1), 0) > 0:  # few tiles have any entry with the first three digits
            total += tl.histogram(digits, 1 << BITS, mask=counted.reshape(keys.numel))
    return total


@triton.jit
def keep_tile(keys, inside, before, state, rows, column_block, n, blocks):
    """The mask of a tile: what is above the threshold, and of the entries that tie all but the first ones."""
    key, pruned, ties = tl.load(state).to(tl.uint32), tl.load(state + 1), tl.load(state + 2)
    keep = inside & (keys > key)
    if pruned < ties:
        tied = inside & (keys == key)
        position = tl.load(before + rows * blocks + column_block, mask=rows < n, other=0)
        position = position[:, None] + tl.cumsum(tied.to(tl.int32), 1)  # from 1
        keep = keep | (tied & (position > pruned))
    return keep


@triton.jit
def _keys(importance, rows, columns, numel, BLOCK_K: tl.constexpr):
    at = rows.to(tl.int64)[:, None] * BLOCK_K + columns[None, :]
    inside = at < numel
    return ordered_keys(tl.load(importance + at, mask=inside, other=0.0)), inside, at


@triton.jit
def _count_digits(
    importance, histogram, state, numel, n,
    SHIFT: tl.constexpr, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((1 << BITS,), dtype=tl.int32)
    for block in range(tl.program_id(0), tl.cdiv(n, BLOCK_N), tl.num_programs(0)):
        rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
        keys, inside, _ = _keys(importance, rows, tl.arange(0, BLOCK_K), numel, BLOCK_K)
        total = count_tile(total, keys, inside, state, SHIFT, BITS)
    tl.atomic_add(histogram + tl.arange(0, 1 << BITS), total, mask=total > 0, sem="relaxed")


@triton.jit
def _count_ties(importance, ties, state, numel, n, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    if tl.load(state + 1) == tl.load(state + 2):  # all that tie are pruned, in whatever order
        return
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    keys, inside, _ = _keys(importance, rows, tl.arange(0, BLOCK_K), numel, BLOCK_K)
    tied = inside & (keys == tl.load(state).to(tl.uint32))
    tl.store(ties + rows, tl.sum(tied.to(tl.int32), 1), mask=rows < n)


@triton.jit
def _write(importance, keep, before, state, numel, n, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    keys, inside, at = _keys(importance, rows, tl.arange(0, BLOCK_K), numel, BLOCK_K)
    tl.store(keep + at, keep_tile(keys, inside, before, state, rows, 0, n, 1), mask=inside)
