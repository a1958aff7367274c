"""Codecs: how a sparse tensor is stored, as positions and values. Each gives back every bit.

A codec splits a tensor into parts, which are tensors themselves and become entries of a safetensors file. What is
pruned is +0.0; every other entry counts as a value, -0.0 and NaN included.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

TILE = 256
"""Entries whose positions inside a tile fit into one byte."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Codec(Protocol):
    """One way to store a tensor."""

    def size(self, tensor: Tensor) -> int | None:
        """How many bytes the parts of a tensor take; None if this codec cannot hold it."""

    def encode(self, tensor: Tensor) -> dict[str, Tensor]:
        """The parts of a tensor."""

    def decode(self, parts: dict[str, Tensor], shape: torch.Size) -> Tensor:
        """The tensor again, bit for bit, in the dtype of its values.

        Raises:
            ValueError: if the parts do not make a tensor of that shape.
        """


class Dense:
    """All entries in order: `values`."""

    def size(self, tensor: Tensor) -> int:
        return tensor.numel() * tensor.element_size()

    def encode(self, tensor: Tensor) -> dict[str, Tensor]:
        return {"values": tensor.detach().cpu().contiguous().flatten()}

    def decode(self, parts: dict[str, Tensor], shape: torch.Size) -> Tensor:
        _check(len(parts["values"]) == shape.numel(), "its values are not as many as its shape says")
        return parts["values"].view(shape)


class Bitmask:
    """`bits`, one for each entry in row-major order, the first in the highest bit of a byte; `values` of those set."""

    def size(self, tensor: Tensor) -> int:
        return -(-tensor.numel() // 8) + _count(tensor) * tensor.element_size()

    def encode(self, tensor: Tensor) -> dict[str, Tensor]:
        flat = _flat_bits(tensor)
        present = flat != 0
        return {"bits": torch.from_numpy(np.packbits(present)), "values": _values(flat[present], tensor.dtype)}

    def decode(self, parts: dict[str, Tensor], shape: torch.Size) -> Tensor:
        numel = shape.numel()
        _check(len(parts["bits"]) == -(-numel // 8), "its bits are not as many as its shape says")
        present = np.unpackbits(parts["bits"].numpy(), count=numel).view(bool)
        return _scatter(np.flatnonzero(present), parts["values"], shape)


class Tiles:
    """For high sparsity. Entries in row-major order, in tiles of 256: `counts`, uint8, of the values in each tile;
    `indices`, uint8, of each value in its tile; `values`. A tile without a single zero does not fit."""

    def size(self, tensor: Tensor) -> int | None:
        counts = _tile_counts(_flat_bits(tensor) != 0)
        if counts.size and counts.max() == TILE:
            return None
        return counts.size + int(counts.sum()) * (1 + tensor.element_size())

    def encode(self, tensor: Tensor) -> dict[str, Tensor]:
        flat = _flat_bits(tensor)
        present = flat != 0
        return {
            "counts": torch.from_numpy(_tile_counts(present).astype(np.uint8)),
            "indices": torch.from_numpy((np.flatnonzero(present) % TILE).astype(np.uint8)),
            "values": _values(flat[present], tensor.dtype),
        }

    def decode(self, parts: dict[str, Tensor], shape: torch.Size) -> Tensor:
        counts, indices = parts["counts"].numpy(), parts["indices"].numpy()
        _check(len(counts) == -(-shape.numel() // TILE), "its tiles are not as many as its shape says")
        _check(int(counts.sum(dtype=np.int64)) == len(indices), "its indices are not as many as its tiles say")
        positions = np.repeat(np.arange(len(counts)) * TILE, counts) + indices
        _check(bool((np.diff(positions) > 0).all()), "its indices do not rise")
        _check(not len(positions) or positions[-1] < shape.numel(), "an index lies behind its end")
        return _scatter(positions, parts["values"], shape)


class TwoOfFour:
    """2:4 along the last dimension: of each group of four, `values` of two entries and their `positions`, two bits
    each, the first in the lowest bits; a byte holds two groups. A group with fewer values is filled up with zeros."""

    def size(self, tensor: Tensor) -> int | None:
        if not tensor.ndim or tensor.shape[-1] % 8:
            return None
        pairs = _pairs_of_groups(tensor)
        if not _FITS[pairs].all():
            return None
        return len(pairs) + 4 * len(pairs) * tensor.element_size()

    def encode(self, tensor: Tensor) -> dict[str, Tensor]:
        positions = _POSITIONS[_pairs_of_groups(tensor)]
        return {
            "positions": torch.from_numpy(positions),
            "values": _values(_flat_bits(tensor)[_two_of_four(positions).ravel()], tensor.dtype),
        }

    def decode(self, parts: dict[str, Tensor], shape: torch.Size) -> Tensor:
        packed = parts["positions"].numpy()
        _check(8 * len(packed) == shape.numel(), "its positions are not as many as its shape says")
        chosen = _two_of_four(packed)
        _check(bool((chosen[:, 0] < chosen[:, 1]).all()), "two positions of a group are not in order")
        return _scatter(chosen.ravel(), parts["values"], shape)


def _pairs_of_groups(tensor: Tensor) -> np.ndarray:
    """Of each two groups of four, which entries are values, as a byte: the first entry is its lowest bit."""
    return np.packbits(_flat_bits(tensor) != 0, bitorder="little")


def _two_of_four(positions: np.ndarray) -> np.ndarray:
    """The place in the tensor, in row-major order, of the two entries of each group, int64 [groups, 2]."""
    nibbles = np.stack((positions & 15, positions >> 4), axis=1).ravel()
    chosen = np.stack((nibbles & 3, nibbles >> 2), axis=1).astype(np.int64)
    return chosen + 4 * np.arange(len(nibbles))[:, None]


def _positions_of_group(mask: int) -> int | None:
    """The positions of the two entries that stand for a group, a bit for each value in `mask`; None if it has more."""
    if mask.bit_count() > 2:
        return None
    # the values first, then what fills up, both in order
    first, second = sorted(sorted(range(4), key=lambda i: not mask >> i & 1)[:2])
    return first | second << 2


_GROUPS = [(_positions_of_group(pair & 15), _positions_of_group(pair >> 4)) for pair in range(256)]
_FITS = np.array([None not in pair for pair in _GROUPS])
_POSITIONS = np.array([(low or 0) | (high or 0) << 4 for low, high in _GROUPS], np.uint8)

CODECS: dict[str, Codec] = {"2:4": TwoOfFour(), "bitmask": Bitmask(), "tiles": Tiles(), "dense": Dense()}


def smallest_codec(tensor: Tensor) -> str:
    """The name of the codec that stores a tensor in the fewest bytes."""
    sizes = {name: codec.size(tensor) for name, codec in CODECS.items()}
    return min((name for name, size in sizes.items() if size is not None), key=lambda name: sizes[name])


def _flat_bits(tensor: Tensor) -> np.ndarray:
    """The entries in row-major order, as integers of their width: 0 stands for +0.0 alone."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(_INTEGERS[tensor.element_size()]).numpy()


def _values(bits: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(bits)).view(dtype)


def _count(tensor: Tensor) -> int:
    return int(np.count_nonzero(_flat_bits(tensor)))


def _tile_counts(present: np.ndarray) -> np.ndarray:
    starts = np.arange(0, present.size, TILE)
    return np.add.reduceat(present, starts, dtype=np.int64) if present.size else starts


def _scatter(positions: np.ndarray, values: Tensor, shape: torch.Size) -> Tensor:
    _check(len(positions) == len(values), "its values are not as many as its positions")
    dtype = _INTEGERS[values.element_size()]
    flat = torch.zeros(shape.numel(), dtype=dtype)
    flat.numpy()[positions] = values.contiguous().view(dtype).numpy()
    return flat.view(values.dtype).view(shape)


def _check(right: bool, problem: str) -> None:
    if not right:
        raise ValueError(f"A stored tensor is broken: {problem}. Download or save the checkpoint again.")
