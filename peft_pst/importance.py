"""What an entry of a weight is worth: the entries with the largest importance stay."""

import torch
from torch import Tensor


def pst_importance(weight: Tensor, A: Tensor, B: Tensor, R: Tensor, C: Tensor, alpha1: float, alpha2: float) -> Tensor:
    """S = |W'| + alpha1 · A B + alpha2 · (R 1ᵀ + 1 Cᵀ)  (PST, arXiv 2205.11005, section 3).

    Args:
        weight: W' = W + beta · U V, [out, in].
        A, B: [out, mask_r] and [mask_r, in], what the data says about single entries.
        R, C: [out] and [in], what the data says about whole rows and columns.

    Returns:
        S, [out, in], in the dtype of the factors.
    """
    return (R[:, None] + C).addmm_(A, B, beta=alpha2, alpha=alpha1).add_(weight.abs())


def pst_importance_grads(
    grad: Tensor, A: Tensor, B: Tensor, alpha1: float, alpha2: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of A, B, R and C from `grad`, the gradient of S, [out, in].

    The gradient that reaches W' through |W'| is `grad ∘ sign(W')`; the caller has it in a shorter form.
    """
    rows, columns = grad.sum(1), grad.sum(0)
    return alpha1 * (grad @ B.T), alpha1 * (A.T @ grad), alpha2 * rows, alpha2 * columns


def effective_weight(weight: Tensor, U: Tensor, V: Tensor, beta: float) -> Tensor:
    """W' = W + beta · U V, [out, in], in the dtype of U and V (PST, arXiv 2205.11005, section 3)."""
    return torch.addmm(weight.to(U.dtype), U, V, alpha=beta)
