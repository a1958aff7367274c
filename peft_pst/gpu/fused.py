"""Which steps have kernels, and the step in terms of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..importance import PST
from ..update import LowRank
from . import has_kernels

if TYPE_CHECKING:
    from ..functional import Method

MAX_RANK = 32
CHUNK = (128, 1024)
"""Rows and columns of the weight that a program of backward sums up."""


def has_fused_step(method: Method, weight: Tensor, arguments: tuple[Tensor, ...]) -> bool:
    """Whether kernels know the method, PST's own, and the shape and dtypes of a weight and its factors."""
    if type(method.update) is not LowRank or type(method.importance) is not PST or not has_kernels(weight.device):
        return False
    small = max(method.update.r, method.importance.mask_r) <= MAX_RANK
    return small and weight.shape[1] % 8 == 0 and all(t.dtype.itemsize <= 4 for t in (weight, *arguments))


def select(
    method: Method, weight: Tensor, num_pruned: Tensor | int, arguments: tuple[Tensor, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """M ∘ W' in `dtype` and M as bits, of the pattern of single entries."""
    from . import step

    return step.select(weight, num_pruned, arguments, _numbers(method), dtype)


class Rebuilt:
    """`functional.Rebuilt` by kernels: neither W' nor the mask is ever stored."""

    def __init__(self, method: Method, weight: Tensor, bits: Tensor, arguments: tuple[Tensor, ...]) -> None:
        self.method, self.weight, self.bits, self.arguments = method, weight, bits, arguments

    def masked(self, dtype: torch.dtype) -> Tensor:
        from . import step

        U, V, *_ = self.arguments
        return step.masked_weight(self.weight, self.bits, U, V, self.method.update.beta, dtype)

    def gradients(self, G: Tensor) -> tuple[None, tuple[Tensor, ...]]:
        from . import step

        bits = None if self.method.straight_through else self.bits
        return None, step.gradients(G, self.weight, bits, self.arguments, _numbers(self.method))


def _numbers(method: Method) -> tuple[float, float, float]:
    return method.update.beta, method.importance.alpha1, method.importance.alpha2
