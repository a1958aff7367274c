"""The masked linear step, forward and backward, as one autograd function.

Under autograd the formula keeps W', S and M of every layer alive, each as large as the weight. This function keeps the
input, the parameters and one bit an entry, and rebuilds the rest in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .gemm import linear
from .gpu.fused import Rebuilt as FusedRebuilt
from .gpu.fused import has_fused_step, select
from .importance import IMPORTANCES, Importance
from .patterns import Pattern, pack_bits, parse_pattern, unpack_bits
from .update import UPDATES, Update

if TYPE_CHECKING:
    from .config import PSTConfig

SINGLE_ENTRIES = parse_pattern("unstructured")


class Live(NamedTuple):
    """A mask that is selected anew in each step: the pattern, and how many entries are pruned, int64 scalar."""

    pattern: Pattern
    num_pruned: Tensor


class Kept(NamedTuple):
    """A mask that was selected before, one bit an entry (`pack_bits`)."""

    bits: Tensor


class Method(NamedTuple):
    """How the weight trains and what its entries are worth. Its arguments are those of the update, then those of the
    importance: parameters and buffers, called `names`."""

    update: Update
    importance: Importance
    straight_through: bool
    """Whether the weight learns as if nothing were pruned."""

    @classmethod
    def of(cls, config: PSTConfig) -> Method:
        """The method that a config names."""
        return cls(UPDATES[config.update](config), IMPORTANCES[config.importance](config), config.straight_through)

    @property
    def names(self) -> tuple[str, ...]:
        return self.update.names + self.importance.names

    def split(self, arguments: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The arguments of the update and those of the importance."""
        size = len(self.update.names)
        return arguments[:size], arguments[size:]

    def weight_and_importance(self, weight: Tensor, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        """W' and its importance S, [out, in], in the dtype of the parameters. Only W' may be overwritten."""
        of_update, of_importance = self.split(arguments)
        updated = self.update.weight(weight, *of_update)
        return updated, self.importance.score(updated, *of_importance)

    def weight_and_mask(self, mask: Live | Kept, weight: Tensor, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        """W' and its mask, [out, in]; the mask bool."""
        if isinstance(mask, Kept):
            updated = self.update.weight(weight, *self.split(arguments)[0])
            return updated, unpack_bits(mask.bits, weight.shape, torch.bool)
        if mask.pattern == SINGLE_ENTRIES and has_fused_step(self, weight, arguments):  # the mask that trains
            _, bits = select(self, weight, mask.num_pruned, arguments, weight.dtype)
            return self.weight_and_mask(Kept(bits), weight, *arguments)
        updated, importance = self.weight_and_importance(weight, *arguments)
        return updated, mask.pattern.mask(importance, mask.num_pruned)


class MaskedLinear(torch.autograd.Function):
    """y = (gates ∘ W') x + b, where the gates are the mask M unless the importance says otherwise.

    G = dyᵀ x is the gradient of the masked weight; from there on update and importance know their gradients. The
    matrix products with x run in the dtype of x, everything else in the dtype of the parameters.

    Arguments of `apply`: x [tokens, in]; the bias [out] in the dtype of x, or None; the mask, `Live` or `Kept`; the
    method; the seed of random gates, int64 scalar on the CPU, None for none; the frozen weight [out, in], or what
    reads it, in forward and again in backward, so that no dense copy is kept in between; the arguments of the method.
    Returns y [tokens, out].
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        bias: Tensor | None,
        mask: Live | Kept,
        method: Method,
        seed: Tensor | None,
        weight: Tensor | Callable[[], Tensor],
        *arguments: Tensor,
    ) -> Tensor:
        ctx.method, ctx.seed, ctx.read = method, seed, weight if callable(weight) else None
        y, bits = forward(x, bias, mask, method, seed, weight() if ctx.read else weight, *arguments)
        ctx.save_for_backward(x, None if ctx.read else weight, bits, *arguments)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_bias, _, _, _, *needs = ctx.needs_input_grad
        x, weight, *others = ctx.saved_tensors
        weight = ctx.read() if ctx.read else weight
        with torch.autocast(dy.device.type, enabled=False):
            dx, dbias, *others = backward(dy, (needs_x, needs_bias, *needs), ctx.method, ctx.seed, x, weight, *others)
        return dx, dbias, None, None, None, *others


def forward(
    x: Tensor,
    bias: Tensor | None,
    mask: Live | Kept,
    method: Method,
    seed: Tensor | None,
    weight: Tensor,
    *arguments: Tensor,
) -> tuple[Tensor, Tensor]:
    """What `MaskedLinear` returns, and the mask as bits."""
    is_fused = has_fused_step(method, weight, arguments)
    if is_fused and isinstance(mask, Live) and mask.pattern == SINGLE_ENTRIES:
        masked, bits = select(method, weight, mask.num_pruned, arguments, x.dtype)
    elif is_fused and isinstance(mask, Kept):
        masked, bits = FusedRebuilt(method, weight, mask.bits, arguments).masked(x.dtype), mask.bits
    else:
        masked, keep = method.weight_and_mask(mask, weight, *arguments)
        bits = pack_bits(keep) if isinstance(mask, Live) else mask.bits
        # a product with ones and zeros: on a CPU, bool operands are many times slower
        masked.mul_(method.importance.gates(keep.to(masked.dtype), seed, *method.split(arguments)[1]))
    return linear(x, masked.to(x.dtype), bias), bits


def backward(
    dy: Tensor,
    needs: Sequence[bool],
    method: Method,
    seed: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bits: Tensor,
    *arguments: Tensor,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, the bias, the weight and the arguments; `needs` says in this order whether somebody needs
    them, and the others may be None."""
    needs_x, needs_bias, needs_weight, *needs_arguments = needs
    dx = dbias = dweight = None
    darguments = (None,) * len(arguments)
    if has_fused_step(method, weight, arguments) and not needs_weight:
        rebuilt = FusedRebuilt(method, weight, bits, arguments)
    else:
        rebuilt = Rebuilt(method, seed, weight, bits, arguments)
    if needs_x:
        dx = linear(dy, rebuilt.masked(dy.dtype).T)
    if needs_bias:
        dbias = dy.sum(0)
    if needs_weight or any(needs_arguments):
        dweight, darguments = rebuilt.gradients(linear(dy.T, x.T))
        dweight = dweight.to(weight.dtype) if needs_weight else None
    return dx, dbias, dweight, *darguments


class Rebuilt:
    """W' and a mask that is known, [out, in], once more."""

    def __init__(
        self, method: Method, seed: Tensor | None, weight: Tensor, bits: Tensor, arguments: tuple[Tensor, ...]
    ) -> None:
        self.method, self.seed = method, seed
        self.of_update, self.of_importance = method.split(arguments)
        self.updated = method.update.weight(weight, *self.of_update)
        self.mask = unpack_bits(bits, weight.shape, self.updated.dtype)

    def masked(self, dtype: torch.dtype) -> Tensor:
        """gates ∘ W'."""
        return (self.updated * self.method.importance.gates(self.mask, self.seed, *self.of_importance)).to(dtype)

    def gradients(self, G: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Those of the weight and of the arguments, from that of the masked weight. It is the last call: W' and the
        mask are overwritten."""
        mask = self.mask.fill_(1) if self.method.straight_through else self.mask
        G = G.to(self.updated.dtype)
        dupdated, *dimportance = self.method.importance.backward(G, self.updated, mask, self.seed, *self.of_importance)
        return dupdated, (*self.method.update.backward(dupdated, *self.of_update), *dimportance)
