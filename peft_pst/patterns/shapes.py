"""The patterns: which entries of a weight are pruned together."""

import functools
import re
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from .selection import keep_largest

COUPLED = ("neuron", "head")


class Pattern(Protocol):
    """Which masks of a weight [out, in] are allowed. Entries are pruned in units, the least important units first."""

    max_sparsity: float
    """The share of pruned entries at which every unit is pruned."""

    def check_shape(self, shape: torch.Size, name: str) -> None:
        """Raise ValueError if the weight called `name` does not divide into units."""

    def num_pruned(self, shape: torch.Size, sparsity: float) -> int:
        """How many entries of a weight are pruned at a sparsity: as many whole units as fit."""

    def mask(self, importance: Tensor, num_pruned: int | Tensor) -> Tensor:
        """The mask with `num_pruned` pruned entries, a number that `num_pruned()` gave.

        Args:
            importance: [out, in], any floating dtype; that of a unit is the sum over what it would lose.
            num_pruned: a number, or an int64 scalar on the device of the importance.

        Returns:
            [out, in], bool: True where an entry stays.
        """


class Units:
    """A pattern whose units are the same entries of a weight whatever their importance."""

    max_sparsity: ClassVar[float] = 1.0

    def unit_size(self, shape: torch.Size) -> int:
        """How many entries of the weight a unit has."""
        raise NotImplementedError

    def scores(self, importance: Tensor) -> Tensor:
        """The importance of each unit, in an order of their own."""
        raise NotImplementedError

    def expand(self, keep: Tensor, shape: torch.Size) -> Tensor:
        """The mask of a weight from which units stay, in the order of `scores`."""
        raise NotImplementedError

    def num_pruned(self, shape: torch.Size, sparsity: float) -> int:
        size = self.unit_size(shape)
        return int(shape.numel() // size * sparsity) * size

    def mask(self, importance: Tensor, num_pruned: int | Tensor) -> Tensor:
        keep = keep_largest(self.scores(importance), num_pruned // self.unit_size(importance.shape))
        return self.expand(keep, importance.shape)


@dataclass(frozen=True)
class Blocks(Units):
    """Blocks of `rows` outputs by `columns` inputs, pruned as a whole; 0 stands for all of them.

    Single entries are blocks of 1x1, whole rows of 1x0, whole columns of 0x1.
    """

    rows: int
    columns: int

    def _sides(self, shape: torch.Size) -> tuple[int, int]:
        return self.rows or shape[0], self.columns or shape[1]

    def check_shape(self, shape: torch.Size, name: str) -> None:
        rows, columns = self._sides(shape)
        if shape[0] % rows or shape[1] % columns:
            raise ValueError(
                f"pattern='block:{rows}x{columns}' does not divide the weight of {name!r}, [out={shape[0]}, "
                f"in={shape[1]}]: choose a block whose sides divide it, or leave the module out of target_modules."
            )

    def unit_size(self, shape: torch.Size) -> int:
        rows, columns = self._sides(shape)
        return rows * columns

    def scores(self, importance: Tensor) -> Tensor:
        rows, columns = self._sides(importance.shape)
        if rows == columns == 1:
            return importance
        blocks = importance.reshape(importance.shape[0] // rows, rows, -1, columns)
        return blocks.sum((1, 3), dtype=_at_least_float32(importance))

    def expand(self, keep: Tensor, shape: torch.Size) -> Tensor:
        rows, columns = self._sides(shape)
        if rows == columns == 1:
            return keep
        return keep[:, None, :, None].expand(-1, rows, -1, columns).reshape(shape)


@dataclass(frozen=True)
class Slices(Units):
    """The part of a coupled structure that lies in one weight: along outputs (dim 0) or inputs (dim 1), `units` slices
    of equal width. Where a weight stacks several projections, as GPT-2 does with queries, keys and values, a unit has
    a slice in each of the `stacks`.
    """

    dim: int
    units: int
    stacks: int = 1

    def check_shape(self, shape: torch.Size, name: str) -> None:
        """Nothing to check: the units were read off the shapes."""

    def _view(self, importance: Tensor) -> Tensor:
        """[stacks, units, width, rest]."""
        return (importance if self.dim == 0 else importance.T).reshape(
            self.stacks, self.units, -1, importance.shape[1 - self.dim]
        )

    def unit_size(self, shape: torch.Size) -> int:
        return shape.numel() // self.units

    def scores(self, importance: Tensor) -> Tensor:
        return self._view(importance).sum((0, 2, 3), dtype=_at_least_float32(importance))

    def expand(self, keep: Tensor, shape: torch.Size) -> Tensor:
        along = shape[self.dim]
        lines = keep[None, :, None].expand(self.stacks, -1, along // (self.stacks * self.units)).reshape(along)
        return (lines[:, None] if self.dim == 0 else lines[None]).expand(shape).contiguous()


@dataclass(frozen=True)
class GroupsOf:
    """N:M: of every M consecutive inputs of an output, N stay. A unit is what one group of M loses."""

    kept: int
    size: int

    @property
    def max_sparsity(self) -> float:
        return (self.size - self.kept) / self.size

    def check_shape(self, shape: torch.Size, name: str) -> None:
        if shape[1] % self.size:
            raise ValueError(
                f"pattern='{self.kept}:{self.size}' does not divide the weight of {name!r}, [out={shape[0]}, "
                f"in={shape[1]}]: its inputs come in groups of {self.size}. Leave the module out of target_modules."
            )

    def num_pruned(self, shape: torch.Size, sparsity: float) -> int:
        return int(shape.numel() // self.size * (sparsity / self.max_sparsity)) * (self.size - self.kept)

    def mask(self, importance: Tensor, num_pruned: int | Tensor) -> Tensor:
        groups = importance.reshape(-1, self.size).T.contiguous()  # [M, groups]: long rows compare faster
        rank = torch.zeros(groups.shape, dtype=torch.uint8, device=groups.device)
        for i in range(self.size):
            for j in range(i + 1, self.size):
                smaller = groups[j] < groups[i]  # of equals the first is pruned
                rank[i] += smaller
                rank[j] += ~smaller
        prune = rank < self.size - self.kept
        cost = groups.mul(prune.view(torch.uint8)).sum(0, dtype=_at_least_float32(groups))
        prune &= ~keep_largest(cost, num_pruned // (self.size - self.kept))
        return ~prune.T.reshape(importance.shape)


def _at_least_float32(importance: Tensor) -> torch.dtype:
    return torch.promote_types(importance.dtype, torch.float32)


@functools.cache
def parse_pattern(text: str) -> Pattern | None:
    """The pattern that a config names; None for a coupled one, whose units are read off a model's modules.

    Raises:
        ValueError: if it is none of `"unstructured"`, `"row"`, `"column"`, `"N:M"`, `"block:RxC"`, `"neuron"` and
            `"head"`.
    """
    named = {"unstructured": Blocks(1, 1), "row": Blocks(1, 0), "column": Blocks(0, 1), **dict.fromkeys(COUPLED)}
    if text in named:
        return named[text]
    numbers = [int(number) for number in re.findall(r"\d+", str(text))]
    if re.fullmatch(r"\d+:\d+", str(text)) and 0 < numbers[0] < numbers[1] <= 128:
        return GroupsOf(*numbers)
    if re.fullmatch(r"block:\d+x\d+", str(text)) and min(numbers) > 0:
        return Blocks(*numbers)
    raise ValueError(
        f"pattern={text!r} is unknown: expected 'unstructured', 'row', 'column', 'N:M' with 0 < N < M <= 128 such as "
        "'2:4', 'block:RxC' (R outputs by C inputs) such as 'block:8x1', 'neuron', or 'head'."
    )
