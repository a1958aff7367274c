"""How a weight is packed for the kernels: rows in slices of eight, columns in tiles, values beside 8-bit indices.

The rows of a weight [out, in] are cut into chunks of up to 256, its columns into tiles of up to 240. In each chunk and
tile the rows are sorted by how many values they have there, and every eight of them make a slice: the first value of
each of the eight rows, then the second, and so on. Shorter rows of a slice are filled up with zeros whose index points
to a row of zeros behind the tile, so that an infinity or a NaN in the input touches no row that has no value for it.
Under the pattern block:8x1 the eight rows are neighbours and share one index.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .target import HAS_BITMASK

SLICE = 8
"""Rows in a slice."""
CHUNK = 256
"""Rows in a chunk, at most: which row is which fits into one byte."""
CHUNKS = 4
"""A weight is cut into a multiple of so many chunks, which threads share out."""
ROWS_MULTIPLE = 16
"""The rows of a chunk are a multiple of the widest vector."""
WORD = 64
"""Columns in a word of a bitmask."""
BITMASK_DENSITY = 0.12
"""From here on one token is faster by a bitmask than by slices."""
BITMASK_COLUMNS = 2**16
"""As many products of a byte with a value are sure to fit into the int32 that sums them."""
DENSE_TILE, SPARSE_TILE = 128, 240
"""Columns in a tile, about: a tile of few tokens or of dense weights is to stay in the first cache."""


class Kind(enum.IntEnum):
    """How values are stored. fp16 values are multiplied in fp16 too."""

    FP32 = 0
    BF16 = 1
    INT8 = 2
    FP16 = 3


class Packed(NamedTuple):
    """A weight [out, in] as the kernels read it, with its bias."""

    kind: Kind
    blocks: bool
    """Whether the rows of a slice share their indices."""
    shape: tuple[int, int]
    tile: int
    """Columns in a tile."""
    chunk: int
    """Rows in a chunk."""
    starts: Tensor
    """int64 [chunks · tiles]: where a segment begins, in rows of eight values."""
    counts: Tensor
    """int32 [chunks · tiles · slices]: of each slice, how many times eight values it has."""
    rows: Tensor
    """uint8 [chunks · tiles · chunk]: which row of the chunk each row of a slice is."""
    indices: Tensor
    """uint8: which column of the tile; the number of columns in a tile stands for the row of zeros."""
    values: Tensor
    """[.., 8] flattened, in fp32, bf16, int8 or fp16."""
    scales: Tensor
    """fp32 [chunks · chunk], what a row is multiplied with in the end: 1 but for int8."""
    bias: Tensor
    """fp32 [chunks · chunk], zeros if there is none."""

    bits: Tensor | None = None
    """int64 [out, words], of an int8 weight that is not too sparse: which of 64 columns have a value, the first in the
    lowest bit. One token is faster this way."""
    bytes: Tensor | None = None
    """int8: the values of each row, one after the other."""
    byte_starts: Tensor | None = None
    """int64 [chunks · chunk]: where the values of a row begin."""
    byte_sums: Tensor | None = None
    """int64 [chunks · chunk]: the sum of the values of a row."""

    @property
    def words(self) -> int:
        """How many times 64 columns there are."""
        return -(-self.shape[1] // WORD)

    @property
    def tiles(self) -> int:
        """How many tiles the columns make."""
        return -(-self.shape[1] // self.tile)

    @property
    def chunks(self) -> int:
        """How many chunks the rows make."""
        return -(-self.shape[0] // self.chunk)


def pack(
    values: Tensor, kind: Kind, scales: Tensor | None = None, bias: Tensor | None = None, tile: int | None = None
) -> Packed:
    """Pack a weight.

    Args:
        values: [out, in], in the dtype of the kind: float32, bfloat16, int8 or float16.
        kind: which dtype that is.
        scales: float32 [out] of an int8 weight.
        bias: [out].
        tile: columns in a tile, a multiple of 16 up to 240, if it is to be that of another weight.
    """
    out, size = values.shape
    present = (values != 0).numpy()
    density = present.mean() if present.size else 0.0
    chunks = max(-(-out // (CHUNKS * CHUNK)) * CHUNKS, 1)
    chunk = _round_up(-(-out // chunks), ROWS_MULTIPLE)
    chunks = -(-out // chunk)
    if tile is None:
        tiles = max(round(size / (DENSE_TILE if density > 0.15 else SPARSE_TILE)), 1)
        tiles = max(tiles, -(-size // 240))
        tile = _round_up(-(-size // tiles), 16)
    tiles = -(-size // tile)
    blocks = _is_blocks(present)
    arrange = _arrange_blocks if blocks else _arrange_entries
    counts, rows, places, columns, total = arrange(present, chunk, chunks, tile, tiles)

    indices = np.full(total * (1 if blocks else SLICE), tile, np.uint8)
    packed = torch.zeros(total * SLICE, dtype=values.dtype)
    if blocks:
        groups, kept = columns
        padded = torch.zeros(_round_up(out, SLICE), size, dtype=values.dtype)
        padded[:out] = values
        indices[places] = kept % tile
        packed.view(-1, SLICE)[torch.from_numpy(places)] = padded.view(-1, SLICE, size)[
            torch.from_numpy(groups), :, torch.from_numpy(kept)
        ]
    else:
        indices[places] = columns % tile
        packed[torch.from_numpy(places)] = values[torch.from_numpy(present)]
    slices = counts.reshape(chunks * tiles, -1)
    starts = np.zeros(chunks * tiles, np.int64)
    np.cumsum(slices.sum(1)[:-1], out=starts[1:])
    bitmask = {}
    if kind is Kind.INT8 and HAS_BITMASK and density > BITMASK_DENSITY and size <= BITMASK_COLUMNS:
        bitmask = _bitmask(values, present, chunks * chunk)
    return Packed(
        kind,
        blocks,
        (out, size),
        tile,
        chunk,
        torch.from_numpy(starts),
        torch.from_numpy(counts.ravel().astype(np.int32)),
        torch.from_numpy(rows.ravel().astype(np.uint8)),
        torch.from_numpy(indices),
        packed,
        _padded(scales, chunks * chunk, 1.0),
        _padded(bias, chunks * chunk, 0.0),
        **bitmask,
    )


def unpack(packed: Packed) -> Tensor:
    """The values [out, in] again."""
    counts = packed.counts.numpy()
    slices = np.repeat(np.arange(len(counts)), counts)  # the slice of every eight values
    segments = slices // (packed.chunk // SLICE)
    rows = packed.rows.view(-1, SLICE).numpy()[slices] + segments[:, None] // packed.tiles * packed.chunk
    indices = np.broadcast_to(packed.indices.view(-1, 1 if packed.blocks else SLICE).numpy(), rows.shape)
    columns = indices + segments[:, None] % packed.tiles * packed.tile
    real = (indices < packed.tile) & (rows < packed.shape[0])
    values = packed.values.new_zeros(packed.shape)
    values[torch.from_numpy(rows[real]), torch.from_numpy(columns[real])] = packed.values.view(-1, SLICE)[
        torch.from_numpy(real)
    ]
    return values


def retile(packed: Packed, tile: int) -> Packed:
    """The same weight in tiles of another width, with the same memory for scales and bias."""
    again = pack(unpack(packed), packed.kind, tile=tile)
    return again._replace(
        **{name: getattr(packed, name) for name in ("scales", "bias", "bits", "bytes", "byte_starts", "byte_sums")}
    )


def _arrange_entries(
    present: np.ndarray, chunk: int, chunks: int, tile: int, tiles: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """Counts [chunks, tiles, slices]; rows [chunks, tiles, chunk]; of each value its place and column; all places."""
    row, column = np.nonzero(present)
    group = row * tiles + column // tile  # of one row and tile: they follow each other
    sizes = np.bincount(group, minlength=chunks * chunk * tiles)
    ordinal = np.arange(len(group)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    sizes = sizes.reshape(chunks, chunk, tiles).transpose(0, 2, 1)
    rows = np.argsort(-sizes, axis=-1, kind="stable")
    rank = np.empty_like(rows)
    np.put_along_axis(rank, rows, np.arange(chunk)[None, None], axis=-1)
    counts = np.take_along_axis(sizes, rows, -1)[..., ::SLICE]  # sorted: the first of a slice has the most
    starts = np.cumsum(counts.ravel()) - counts.ravel()
    rank = rank.transpose(0, 2, 1).ravel()[group]
    segment = row // chunk * tiles + column // tile
    places = (starts[segment * (chunk // SLICE) + rank // SLICE] + ordinal) * SLICE + rank % SLICE
    return counts, rows, places, column, int(counts.sum())


def _arrange_blocks(
    present: np.ndarray, chunk: int, chunks: int, tile: int, tiles: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray], int]:
    """The same for blocks of 8x1: a slice is eight neighbouring rows, and what has a place is a block."""
    out, size = present.shape
    padded = np.zeros((chunks * chunk, size), bool)
    padded[:out] = present
    group, column = np.nonzero(padded.reshape(-1, SLICE, size).any(1))
    slices = chunk // SLICE
    key = (group // slices * tiles + column // tile) * slices + group % slices
    order = np.argsort(key, kind="stable")
    counts = np.bincount(key, minlength=chunks * tiles * slices)
    places = np.arange(len(order))
    rows = np.broadcast_to(np.arange(chunk), (chunks, tiles, chunk))
    return counts.reshape(chunks, tiles, slices), rows, places, (group[order], column[order]), int(counts.sum())


def _bitmask(values: Tensor, present: np.ndarray, rows: int) -> dict[str, Tensor]:
    """The parts of a packed weight that are its bitmask."""
    out, size = present.shape
    padded = np.zeros((out, -(-size // WORD) * WORD), bool)
    padded[:, :size] = present
    bits = np.packbits(padded, axis=1, bitorder="little").view(np.int64)
    starts = np.zeros(rows, np.int64)
    np.cumsum(present.sum(1)[:-1], out=starts[1:out])
    kept = values[torch.from_numpy(present)]
    # a word is always read whole
    return {
        "bits": torch.from_numpy(bits),
        "bytes": torch.cat((kept, kept.new_zeros(WORD))),
        "byte_starts": torch.from_numpy(starts),
        "byte_sums": torch.nn.functional.pad(values.sum(1, dtype=torch.int64), (0, rows - out)),
    }


def _is_blocks(present: np.ndarray) -> bool:
    """Whether eight neighbouring rows have their values in the same columns, everywhere."""
    out = len(present)
    groups = np.pad(present, ((0, -out % SLICE), (0, 0)), mode="edge").reshape(-1, SLICE, present.shape[1])
    return out >= SLICE and np.array_equal(groups.any(1), groups.all(1))


def _padded(vector: Tensor | None, size: int, fill: float) -> Tensor:
    padded = torch.full((size,), fill, dtype=torch.float32)
    if vector is not None:
        padded[: len(vector)] = vector.detach()
    return padded


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
