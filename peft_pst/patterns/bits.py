"""Masks as bits, the form in which they are kept between forward and backward."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def pack_bits(mask: Tensor) -> Tensor:
    """A bool mask as one bit an entry, uint8 [ceil(numel / 8)], in the order of `numpy.packbits`."""
    return (_pack_numpy if mask.device.type == "cpu" else _pack_torch)(mask.flatten())


def unpack_bits(bits: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The mask of `pack_bits` again, as ones and zeros of `shape` and `dtype`."""
    unpack = _unpack_numpy if bits.device.type == "cpu" else _unpack_torch
    return unpack(bits, shape.numel()).view(shape).to(dtype)


def _pack_numpy(flat: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(flat.numpy()))


def _pack_torch(flat: Tensor) -> Tensor:
    padded = F.pad(flat.view(torch.uint8), (0, -flat.numel() % 8)).view(-1, 8)
    return (padded << _places(flat.device)).sum(1, dtype=torch.uint8)


def _unpack_numpy(bits: Tensor, numel: int) -> Tensor:
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=numel))


def _unpack_torch(bits: Tensor, numel: int) -> Tensor:
    return (bits[:, None] >> _places(bits.device) & 1).flatten()[:numel]


def _places(device: torch.device) -> Tensor:
    """How far each bit of a byte is shifted, in the order of `numpy.packbits`; made on the device, where a copy from
    the host would make the host wait."""
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=device)
