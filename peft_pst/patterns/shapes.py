"""The patterns: which entries of a weight are pruned together."""

import functools
import re
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from .selection import keep_largest


class Pattern(Protocol):
    """Which masks of a weight [out, in] are allowed. Entries are pruned in units, the least important units first."""

    max_sparsity: float
    """The share of pruned entries at which every unit is pruned."""

    def check_shape(self, shape: torch.Size, name: str) -> None:
        """Raise ValueError if the weight called `name` does not divide into units."""

    def num_pruned(self, shape: torch.Size, sparsity: float) -> int:
        """How many entries of a weight are pruned at a sparsity: as many whole units as fit."""

    def mask(self, importance: Tensor, num_pruned: int) -> Tensor:
        """The mask with `num_pruned` pruned entries, a number that `num_pruned()` gave.

        Args:
            importance: [out, in], any floating dtype; that of a unit is the sum over what it would lose.

        Returns:
            [out, in], bool: True where an entry stays.
        """


@dataclass(frozen=True)
class Blocks:
    """Blocks of `rows` outputs by `columns` inputs, pruned as a whole; 0 stands for all of them.

    Single entries are blocks of 1x1, whole rows of 1x0, whole columns of 0x1.
    """

    rows: int
    columns: int
    max_sparsity: ClassVar[float] = 1.0

    def _size(self, shape: torch.Size) -> tuple[int, int]:
        return self.rows or shape[0], self.columns or shape[1]

    def check_shape(self, shape: torch.Size, name: str) -> None:
        rows, columns = self._size(shape)
        if shape[0] % rows or shape[1] % columns:
            raise ValueError(
                f"pattern='block:{rows}x{columns}' does not divide the weight of {name!r}, [out={shape[0]}, "
                f"in={shape[1]}]: choose a block whose sides divide it, or leave the module out of target_modules."
            )

    def num_pruned(self, shape: torch.Size, sparsity: float) -> int:
        rows, columns = self._size(shape)
        return int(shape.numel() // (rows * columns) * sparsity) * rows * columns

    def mask(self, importance: Tensor, num_pruned: int) -> Tensor:
        rows, columns = self._size(importance.shape)
        if rows == columns == 1:
            return keep_largest(importance, num_pruned)
        blocks = importance.reshape(importance.shape[0] // rows, rows, -1, columns)
        keep = keep_largest(blocks.sum((1, 3), dtype=_at_least_float32(importance)), num_pruned // (rows * columns))
        return keep[:, None, :, None].expand(blocks.shape).reshape(importance.shape)


@dataclass(frozen=True)
class GroupsOf:
    """N:M: of every M consecutive inputs of an output, N stay. A unit is what one group of M loses."""

    kept: int
    size: int

    @property
    def max_sparsity(self) -> float:
        return 1 - self.kept / self.size

    def check_shape(self, shape: torch.Size, name: str) -> None:
        if shape[1] % self.size:
            raise ValueError(
                f"pattern='{self.kept}:{self.size}' does not divide the weight of {name!r}, [out={shape[0]}, "
                f"in={shape[1]}]: its inputs come in groups of {self.size}. Leave the module out of target_modules."
            )

    def num_pruned(self, shape: torch.Size, sparsity: float) -> int:
        return int(shape.numel() // self.size * (sparsity / self.max_sparsity)) * (self.size - self.kept)

    def mask(self, importance: Tensor, num_pruned: int) -> Tensor:
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
def parse_pattern(text: str) -> Pattern:
    """The pattern that a config names.

    Raises:
        ValueError: if it is none of `"unstructured"`, `"row"`, `"column"`, `"N:M"` and `"block:RxC"`.
    """
    named = {"unstructured": Blocks(1, 1), "row": Blocks(1, 0), "column": Blocks(0, 1)}
    if text in named:
        return named[text]
    numbers = [int(number) for number in re.findall(r"\d+", str(text))]
    if re.fullmatch(r"\d+:\d+", str(text)) and 0 < numbers[0] < numbers[1] <= 128:
        return GroupsOf(*numbers)
    if re.fullmatch(r"block:\d+x\d+", str(text)) and min(numbers) > 0:
        return Blocks(*numbers)
    raise ValueError(
        f"pattern={text!r} is unknown: expected 'unstructured', 'row', 'column', 'N:M' with 0 < N < M <= 128 such as "
        "'2:4', or 'block:RxC' (R outputs by C inputs) such as 'block:8x1'."
    )
