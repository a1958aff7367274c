"""Masks as bits, the form in which they are kept between forward and backward."""

import numpy as np
import torch
from torch import Tensor

_BIT_WEIGHTS = (128, 64, 32, 16, 8, 4, 2, 1)  # the order of numpy.packbits


def pack_bits(mask: Tensor) -> Tensor:
    """A bool mask as one bit an entry, uint8 [ceil(numel / 8)], in the order of `numpy.packbits`."""
    flat = mask.flatten()
    if flat.device.type == "cpu":
        return torch.from_numpy(np.packbits(flat.numpy()))
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (padded * padded.new_tensor(_BIT_WEIGHTS, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The mask of `pack_bits` again, as ones and zeros of `shape` and `dtype`."""
    numel = shape.numel()
    if bits.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(bits.numpy(), count=numel)).view(shape).to(dtype)
    ones = (bits[:, None] & bits.new_tensor(_BIT_WEIGHTS)) != 0
    return ones.flatten()[:numel].view(shape).to(dtype)
