"""What serves a SparseLinear on a GPU: its weight in tiles, multiplied as it is.

`FEW`, up to which the kernel for few tokens is used, is NOT measured: no GPU was at hand. More tokens make the weight
dense for the time of their product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..gpu import has_kernels
from .codecs import TILE

if TYPE_CHECKING:
    from ..gpu.product import Tiles
    from .linear import SparseLinear

FEW = 16


def is_possible(linear: SparseLinear, x: Tensor) -> bool:
    """Whether there are kernels for the weight of a layer and an input in fp32, bf16 or fp16 where they are now."""
    here = linear.description.dtype != "float64" and all(part.device == x.device for part in linear.parts.values())
    return here and has_kernels(x.device)


def product(linear: SparseLinear, x: Tensor) -> Tensor:
    """[..., in] to [..., out], without gradients, in the dtype of x."""
    from ..gpu.product import dense, few_tokens

    flat, weight, bias = x.reshape(-1, linear.in_features), in_tiles(linear), linear.bias
    if 0 < len(flat) <= FEW:
        y = few_tokens(flat, weight, bias)
    else:
        with torch.autocast(x.device.type, enabled=False):
            y = F.linear(flat, dense(weight, x.dtype), None if bias is None else bias.to(x.dtype))
    return y.view(*x.shape[:-1], linear.out_features)


def gradient(linear: SparseLinear, grad: Tensor) -> Tensor:
    """The gradient of the input, in the dtype of that of the output."""
    from ..gpu.product import dense

    with torch.autocast(grad.device.type, enabled=False):
        return grad @ dense(in_tiles(linear), grad.dtype)


def in_tiles(linear: SparseLinear) -> Tiles:
    """The weight of a layer in tiles: its own parts where they are that of `nn.Linear` with rows of whole tiles, else
    made at the first call, which a CUDA graph cannot record, and kept beside them."""
    if linear._tiles is None:
        parts, description = linear.parts, linear.description
        is_stored_so = description.codec == "tiles" and "scales" not in parts and linear.in_features % TILE == 0
        linear._tiles = _as_stored(linear) if is_stored_so and not linear.conv1d else _repacked(linear)
    return linear._tiles


def _as_stored(linear: SparseLinear) -> Tiles:
    from ..gpu.product import Tiles

    parts = linear.parts
    offsets = _offsets(parts["counts"])
    tiles = linear.out_features * linear.in_features // TILE
    if len(parts["counts"]) != tiles:
        raise ValueError(
            f"A sparse weight is broken: its shape has {tiles} tiles, but it counts those of {len(parts['counts'])}. "
            "Download or save the checkpoint again."
        )
    if int(offsets[-1]) != len(parts["indices"]) or len(parts["indices"]) != len(parts["values"]):
        raise ValueError(
            f"A sparse weight is broken: its tiles say {int(offsets[-1])} values, but it has {len(parts['indices'])} "
            f"indices and {len(parts['values'])} values. Download or save the checkpoint again."
        )
    return Tiles(offsets, parts["indices"], parts["values"], (linear.out_features, linear.in_features))


def _repacked(linear: SparseLinear) -> Tiles:
    from ..gpu.product import Tiles

    weight = linear.weight
    weight = weight.T if linear.conv1d else weight
    entries = F.pad(weight, (0, -linear.in_features % TILE)).reshape(-1, TILE)
    present = entries != 0
    indices = present.nonzero()[:, 1].to(torch.uint8)
    return Tiles(_offsets(present.sum(1)), indices, entries[present], (linear.out_features, linear.in_features))


def _offsets(counts: Tensor) -> Tensor:
    return F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
