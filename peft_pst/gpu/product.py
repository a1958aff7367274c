"""Products with a weight that stays compressed in the memory of a GPU.

The weight is in tiles of 256 entries of a row: `offsets`, int32 [out * tiles + 1], of the first value of each tile;
`indices`, uint8, of each value in its tile; `values`. All lanes of a warp read one tile, so that the inputs that they
gather lie close together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sparse.codecs import TILE
from .launch import device_of

SLOTS = 16
"""Tiles that a program has in flight, at most."""
IN_FLIGHT = 2048
"""Values of them: each takes a thread of the program registers."""


class Tiles(NamedTuple):
    """A weight [out, in] in tiles."""

    offsets: Tensor
    indices: Tensor
    values: Tensor
    shape: tuple[int, int]

    @property
    def of_row(self) -> int:
        """How many tiles a row has."""
        return triton.cdiv(self.shape[1], TILE)

    @property
    def width(self) -> int:
        """Values that are read of a tile at a time: as many as nearly each has, where zeros fall by chance. The tiles
        that are in flight together take as many turns as the fullest of them."""
        mean = self.values.numel() / max(1, self.offsets.numel() - 1)
        return min(TILE, max(16, triton.next_power_of_2(int(mean + 3 * mean**0.5))))

    @property
    def slots(self) -> int:
        """Tiles that a program has in flight."""
        return min(SLOTS, IN_FLIGHT // self.width)


def few_tokens(x: Tensor, weight: Tiles, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b of few tokens, in the dtype of x: x [tokens, in], b [out], the sums in fp32 and in a fixed order. Reads
    the compressed bytes once."""
    (out, _), tokens = weight.shape, len(x)
    y = torch.empty((tokens, out), dtype=x.dtype, device=x.device)
    padded = triton.next_power_of_2(tokens)
    slots = max(1, weight.slots // padded)
    with device_of(x):
        _few_tokens[(out,)](
            x.T.contiguous(), weight.offsets, weight.indices, weight.values, bias, y, weight.of_row, out, tokens,
            HAS_BIAS=bias is not None, TILE=TILE, SLOTS=slots, WIDTH=weight.width, TOKENS=padded,
            num_warps=4,
        )  # fmt: skip
    return y


def dense(weight: Tiles, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] with its zeros."""
    out, size = weight.shape
    full = torch.zeros((out, size), dtype=dtype, device=weight.values.device)
    grid = (out, triton.cdiv(weight.of_row, weight.slots))
    with device_of(full):
        _dense[grid](
            weight.offsets, weight.indices, weight.values, full, weight.of_row, size,
            TILE=TILE, SLOTS=weight.slots, WIDTH=weight.width, num_warps=4,
        )  # fmt: skip
    return full


@triton.jit
def _bounds(offsets, row, tile, of_row):
    """Where the values of tiles of a row start and end."""
    at, inside = offsets + row * of_row + tile, tile < of_row
    return tl.load(at, mask=inside, other=0), tl.load(at + 1, mask=inside, other=0)


@triton.jit
def _entries(indices, values, tile, start, end, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """The next values of each tile, [tiles, WIDTH]: their columns, themselves, and whether they are there."""
    at = start[:, None] + tl.arange(0, WIDTH)[None, :]
    present = at < end[:, None]
    column = tile[:, None] * TILE + tl.load(indices + at, mask=present, other=0).to(tl.int32)
    return column, tl.load(values + at, mask=present, other=0.0), present


@triton.jit
def _few_tokens(
    x, offsets, indices, values, bias, y, of_row, out, tokens,
    HAS_BIAS: tl.constexpr, TILE: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    row, token = tl.program_id(0), tl.arange(0, TOKENS)
    total = tl.zeros((SLOTS, WIDTH, TOKENS), dtype=tl.float32)
    for first in range(0, of_row, SLOTS):
        tile = first + tl.arange(0, SLOTS)
        start, end = _bounds(offsets, row, tile, of_row)
        for begin in range(0, tl.max(end - start, 0), WIDTH):
            column, value, present = _entries(indices, values, tile, start + begin, end, TILE, WIDTH)
            found = (present[:, :, None]) & (token < tokens)[None, None, :]
            inputs = tl.load(x + column[:, :, None] * tokens + token[None, None, :], mask=found, other=0.0)
            total += value.to(tl.float32)[:, :, None] * inputs.to(tl.float32)
    result = tl.sum(tl.sum(total, 1), 0)
    if HAS_BIAS:
        result += tl.load(bias + row).to(tl.float32)
    tl.store(y + token.to(tl.int64) * out + row, result.to(y.dtype.element_ty), mask=token < tokens)


@triton.jit
def _dense(offsets, indices, values, full, of_row, size, TILE: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr):
    row, tile = tl.program_id(0), tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    start, end = _bounds(offsets, row, tile, of_row)
    for begin in range(0, tl.max(end - start, 0), WIDTH):
        column, value, present = _entries(indices, values, tile, start + begin, end, TILE, WIDTH)
        tl.store(full + row.to(tl.int64) * size + column, value.to(full.dtype.element_ty), mask=present)
