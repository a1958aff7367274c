"""The sparse low-rank boost (SLoRB; AST, arXiv 2407.20584): a small dense branch beside a masked weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAMES = ("pst_boost", "pst_projection")
"""Its parameters in an adapter: S, and P where it trains."""


def boost(x: Tensor, S: Tensor, P: Tensor | None = None) -> Tensor:
    """(x Pᵀ) Sᵀ, [..., in] to [..., out], in the dtype of x.

    Args:
        S: [out, in / k].
        P: [in / k, in]; without it the one that sums each k consecutive inputs (`block_ones`).
    """
    sums = x.unflatten(-1, (S.shape[1], -1)).sum(-1) if P is None else F.linear(x, P.to(x.dtype))
    return F.linear(sums, S.to(x.dtype))


def block_ones(groups: int, size: int) -> Tensor:
    """P at its start, float32 [groups, groups * size]: row i is one in the i-th group of `size` inputs."""
    return torch.eye(groups).repeat_interleave(size, dim=1)


def mean_pruned(pruned: Tensor, groups: int) -> Tensor:
    """S at its start, [out, groups]: of each group of k inputs the sum of the pruned entries over k.

    Args:
        pruned: (1 - M) ∘ W, [out, in].
    """
    return pruned.unflatten(1, (groups, -1)).mean(-1)


class Boosted(nn.Module):
    """A merged layer and its boost: y = linear(x) + (x Pᵀ) Sᵀ.

    Args:
        linear: the layer, `nn.Linear`, transformers' `Conv1D` or `SparseLinear`.
        boost: S, [out, in / k].
        projection: P, [in / k, in]; None for the one that sums each k consecutive inputs.
    """

    def __init__(self, linear: nn.Module, boost: Tensor, projection: Tensor | None = None) -> None:
        super().__init__()
        self.linear = linear
        self.boost = nn.Parameter(boost.detach(), requires_grad=False)
        self.projection = None if projection is None else nn.Parameter(projection.detach(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The sparse weight, without the boost; models look at its dtype."""
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the layer."""
        return self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return self.linear(x) + boost(x, self.boost, self.projection)
