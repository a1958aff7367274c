"""A few entries of a weight, by which an adapter knows the weight that it was made for."""

import torch
from torch import Tensor

FINGERPRINT_SIZE = 64


@torch.no_grad()
def fingerprint(weight: Tensor) -> Tensor:
    """64 entries spread evenly over a weight, as the bits of their float64: int64 [64]. Zeros if it has no data."""
    if weight.device.type == "meta":
        return torch.zeros(FINGERPRINT_SIZE, dtype=torch.int64)
    indices = torch.arange(FINGERPRINT_SIZE, device=weight.device) * (weight.numel() - 1) // (FINGERPRINT_SIZE - 1)
    return weight.detach().reshape(-1)[indices].double().view(torch.int64)


def same_fingerprint(a: Tensor, b: Tensor) -> bool:
    """Whether two fingerprints are of the same weight, stored in whatever floating dtype.

    Entries may differ by 2⁻⁷ of their size, the rounding of bfloat16, and below it by float16's smallest step. A
    fingerprint of zeros stands for a weight that was not there to be read, and fits every other.
    """
    a, b = a.view(torch.float64), b.to(a.device).view(torch.float64)
    unknown = not (a.any() and b.any())
    return unknown or torch.allclose(a, b, rtol=2**-7, atol=2**-24, equal_nan=True)
