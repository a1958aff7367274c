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
    left, right = _extended(A, B, R, C, alpha1, alpha2)
    return weight.abs().addmm_(left, right)


def pst_importance_grads(
    grad: Tensor, A: Tensor, B: Tensor, alpha1: float, alpha2: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of A, B, R and C from `grad`, the gradient of S, [out, in].

    The gradient that reaches W' through |W'| is `grad ∘ sign(W')`; the caller has it in a shorter form.
    """
    ones = grad.new_ones
    dA, dR = (grad @ torch.cat((alpha1 * B, alpha2 * ones(1, B.shape[1]))).T).tensor_split((-1,), dim=1)
    dB, dC = (torch.cat((alpha1 * A, alpha2 * ones(A.shape[0], 1)), dim=1).T @ grad).tensor_split((-1,))
    return dA, dB, dR[:, 0], dC[0]


def _extended(A: Tensor, B: Tensor, R: Tensor, C: Tensor, alpha1: float, alpha2: float) -> tuple[Tensor, Tensor]:
    """alpha1 · A B + alpha2 · (R 1ᵀ + 1 Cᵀ) as one product, which reads and writes S once."""
    ones = torch.ones_like
    left = torch.cat((alpha1 * A, alpha2 * R[:, None], alpha2 * ones(R)[:, None]), dim=1)
    return left, torch.cat((B, ones(C)[None], C[None]))


def effective_weight(weight: Tensor, U: Tensor, V: Tensor, beta: float) -> Tensor:
    """W' = W + beta · U V, [out, in], in the dtype of U and V (PST, arXiv 2205.11005, section 3)."""
    return torch.addmm(weight.to(U.dtype), U, V, alpha=beta)
