"""The masked linear step, forward and backward, as one autograd function.

Under autograd the formula keeps W', S and M of every layer alive, each as large as the weight. This function keeps the
input, the small factors and one bit an entry, and rebuilds the rest in backward.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .gemm import linear
from .importance import effective_weight, pst_importance, pst_importance_grads
from .patterns import Pattern, pack_bits, unpack_bits


def weight_and_importance(
    weight: Tensor,
    U: Tensor,
    V: Tensor,
    A: Tensor,
    B: Tensor,
    R: Tensor,
    C: Tensor,
    beta: float,
    alpha1: float,
    alpha2: float,
) -> tuple[Tensor, Tensor]:
    """W' and its importance S.

    Args:
        weight: the frozen weight W, [out, in].
        U, V, A, B, R, C: [out, r], [r, in], [out, mask_r], [mask_r, in], [out], [in].

    Returns:
        W' and S, [out, in], in the dtype of the factors.
    """
    updated = effective_weight(weight, U, V, beta)
    return updated, pst_importance(updated, A, B, R, C, alpha1, alpha2)


class MaskedLinear(torch.autograd.Function):
    """y = (M ∘ W') x + b with the straight-through estimator dS = dM (PST, arXiv 2205.11005, section 3).

    With G = dyᵀ x, the gradient of the masked weight:

        dS = G ∘ W'
        dW' = G ∘ M + dS ∘ sign(W') = G ∘ (M + |W'|)

    The matrix products with x run in the dtype of x, everything else in the dtype of the factors.

    Arguments of `apply`: x [tokens, in]; the bias [out] in the dtype of x, or None; the pattern of the mask; how many
    entries are pruned, int64 scalar; then those of `weight_and_importance`. Returns y [tokens, out].
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        bias: Tensor | None,
        pattern: Pattern,
        num_pruned: Tensor,
        weight: Tensor,
        U: Tensor,
        V: Tensor,
        A: Tensor,
        B: Tensor,
        R: Tensor,
        C: Tensor,
        beta: float,
        alpha1: float,
        alpha2: float,
    ) -> Tensor:
        updated, importance = weight_and_importance(weight, U, V, A, B, R, C, beta, alpha1, alpha2)
        mask = pattern.mask(importance, int(num_pruned))
        ctx.save_for_backward(x, weight, U, V, A, B, pack_bits(mask))
        ctx.scales = beta, alpha1, alpha2
        # a product with ones and zeros: on a CPU, bool operands are many times slower
        updated.mul_(importance.copy_(mask.view(torch.uint8)))
        return linear(x, updated.to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(dy.device.type, enabled=False):
            return _backward(ctx, dy)


def _backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, U, V, A, B, bits = ctx.saved_tensors
    beta, alpha1, alpha2 = ctx.scales
    needs_x, needs_bias, _, _, needs_weight, *needs_factors = ctx.needs_input_grad[:11]
    dx = dbias = dweight = dU = dV = dA = dB = dR = dC = None
    updated = effective_weight(weight, U, V, beta)
    mask = unpack_bits(bits, weight.shape, updated.dtype)
    masked = updated * mask
    if needs_x:
        dx = linear(dy, masked.to(dy.dtype).T)
    if needs_bias:
        dbias = dy.sum(0)
    if needs_weight or any(needs_factors):
        G = linear(dy.T, x.T).to(updated.dtype)
        dS = torch.mul(G, updated, out=masked)
        dA, dB, dR, dC = pst_importance_grads(dS, A, B, alpha1, alpha2)
        dupdated = updated.abs_().add_(mask).mul_(G)
        dU, dV = beta * (dupdated @ V.T), beta * (U.T @ dupdated)
        dweight = dupdated.to(weight.dtype) if needs_weight else None
    return dx, dbias, None, None, dweight, dU, dV, dA, dB, dR, dC, None, None, None
