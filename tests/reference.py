"""PST as the paper writes it, with everything left to autograd: the truth that the tests compare with."""

import torch
import torch.nn.functional as F


def plain_importance(weight, U, V, A, B, R, C, beta=1.0, alpha1=1.0, alpha2=1.0):
    updated = weight + beta * (U @ V)
    return updated, updated.abs() + alpha1 * (A @ B) + alpha2 * (R[:, None] + C[None, :])


def plain_mask(importance, num_pruned):
    """The first `num_pruned` entries of a stable sort are pruned: ties go in row-major order."""
    mask = torch.ones(importance.numel(), dtype=importance.dtype)
    mask[torch.argsort(importance.detach().flatten(), stable=True)[:num_pruned]] = 0
    return mask.view_as(importance)


def plain_pst(x, bias, num_pruned, weight, *factors_and_scales):
    updated, importance = plain_importance(weight, *factors_and_scales)
    straight_through = plain_mask(importance, num_pruned) + (importance - importance.detach())
    return F.linear(x, straight_through * updated, bias)


def random_factors(n, k, r=3, mask_r=2, dtype=torch.float64, integers=False):
    """U, V, A, B, R, C; as small integers the arithmetic is exact, and importances tie."""
    shapes = ((n, r), (r, k), (n, mask_r), (mask_r, k), (n,), (k,))
    if integers:
        return [torch.randint(-1, 2, shape).to(dtype) for shape in shapes]
    scales = (1, 0.1, 1, 0.1, 0.1, 0.1)
    return [scale * torch.randn(shape, dtype=dtype) for shape, scale in zip(shapes, scales, strict=True)]
