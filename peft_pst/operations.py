"""The masked linear step as torch custom operations: what torch.compile sees of it.

The graph of a compiled step has no break, and a new count of pruned entries compiles nothing, since the count is a
tensor. Forward and backward are one operation each and run the code that runs without a compiler: the results are the
same bit for bit, and the same is kept in between. A compiler that saw inside would find W' in both and keep it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from . import functional
from .functional import Kept, Live, Method
from .patterns import parse_pattern

if TYPE_CHECKING:
    from .config import PSTConfig

NUMBERS = ("r", "mask_r", "beta", "alpha1", "alpha2", "straight_through")
"""The numbers of a config that methods read: an operation takes no config, but names and numbers."""


def masked_linear(
    x: Tensor,
    bias: Tensor | None,
    mask: Live | Kept,
    config: PSTConfig,
    seed: Tensor | None,
    weight: Tensor,
    arguments: tuple[Tensor, ...],
) -> Tensor:
    """`MaskedLinear.apply` as one operation, with the method and the pattern of a config."""
    tensor, pattern = (mask.num_pruned, config.pattern) if isinstance(mask, Live) else (mask.bits, None)
    numbers = [float(getattr(config, name)) for name in NUMBERS]
    method = (config.update, config.importance, numbers)
    return torch.ops.peft_pst.masked_linear(x, weight, list(arguments), bias, tensor, pattern, seed, *method)[0]


def _method(update: str, importance: str, numbers: Sequence[float]) -> Method:
    return Method.of(SimpleNamespace(update=update, importance=importance, **dict(zip(NUMBERS, numbers, strict=True))))


@torch.library.custom_op("peft_pst::masked_linear", mutates_args=())
def _masked_linear(
    x: Tensor,
    weight: Tensor,
    arguments: Sequence[Tensor],
    bias: Tensor | None,
    mask: Tensor,
    pattern: str | None,
    seed: Tensor | None,
    update: str,
    importance: str,
    numbers: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """y and the bits of the mask. Without a pattern `mask` is the bits of a kept one, and the second output is empty,
    since an operation does not return what it was given; otherwise how many entries are pruned."""
    chosen = Kept(mask) if pattern is None else Live(parse_pattern(pattern), mask)
    method = _method(update, importance, numbers)
    y, bits = functional.forward(x, bias, chosen, method, seed, weight, *arguments)
    return y, bits.new_empty(0) if pattern is None else bits


@_masked_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    arguments: Sequence[Tensor],
    bias: Tensor | None,
    mask: Tensor,
    pattern: str | None,
    *method: Any,
) -> tuple[Tensor, Tensor]:
    size = 0 if pattern is None else -(-weight.numel() // 8)
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(size, dtype=torch.uint8)


@torch.library.custom_op("peft_pst::masked_linear_backward", mutates_args=())
def _masked_linear_backward(
    dy: Tensor,
    needs: Sequence[bool],
    x: Tensor,
    weight: Tensor,
    arguments: Sequence[Tensor],
    bits: Tensor,
    seed: Tensor | None,
    update: str,
    importance: str,
    numbers: Sequence[float],
) -> list[Tensor]:
    """The gradients that somebody needs, of x, the bias, the weight and the arguments in this order."""
    method = _method(update, importance, numbers)
    with torch.autocast(dy.device.type, enabled=False):
        gradients = functional.backward(dy, needs, method, seed, x, weight, bits, *arguments)
    pairs = zip(gradients, (x, dy, weight, *arguments), strict=True)
    return _apart([gradient.to(of.dtype) for gradient, of in itertools.compress(pairs, needs)])


def _apart(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors contiguous and with a storage each, as an operation must return them."""
    owners = Counter(tensor.untyped_storage()._cdata for tensor in tensors)
    shared = (owners[tensor.untyped_storage()._cdata] > 1 for tensor in tensors)
    copy = partial(torch.clone, memory_format=torch.contiguous_format)
    return [copy(tensor) if s else tensor.contiguous() for tensor, s in zip(tensors, shared, strict=True)]


@_masked_linear_backward.register_fake
def _(
    dy: Tensor, needs: Sequence[bool], x: Tensor, weight: Tensor, arguments: Sequence[Tensor], *method: Any
) -> list[Tensor]:
    of = (x, dy.new_empty(dy.shape[1]), weight, *arguments)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in itertools.compress(of, needs)]


def _save(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, arguments, _, mask, pattern, seed, *method = inputs
    ctx.save_for_backward(x, weight, mask if pattern is None else output[1], seed, *arguments)
    ctx.method = method


def _backward(ctx: FunctionCtx, dy: Tensor, _: None) -> tuple[Tensor | list[Tensor | None] | None, ...]:
    x, weight, bits, seed, *arguments = ctx.saved_tensors
    needs_x, needs_weight, needs_arguments, needs_bias, *_ = ctx.needs_input_grad
    needs = [needs_x, needs_bias, needs_weight, *needs_arguments]
    needed = torch.ops.peft_pst.masked_linear_backward(dy, needs, x, weight, arguments, bits, seed, *ctx.method)
    gradients = iter(needed)
    dx, dbias, dweight, *darguments = [next(gradients) if need else None for need in needs]
    return dx, dweight, darguments, dbias, *[None] * 6


_masked_linear.register_autograd(_backward, setup_context=_save)
