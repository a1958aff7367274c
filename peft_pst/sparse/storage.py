"""A stored tensor: parts that a codec made, and a description that gives the tensor back."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .codecs import CODECS, smallest_codec

Values = Literal["exact", "bf16", "fp16", "int8"]
ROUNDED = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Description(NamedTuple):
    """What the parts of a tensor do not say themselves; all of it is JSON."""

    codec: str
    shape: list[int]
    dtype: str
    """The dtype of the tensor, a name of torch such as "float32"."""


def encode(tensor: Tensor, values: Values = "exact") -> tuple[Description, dict[str, Tensor]]:
    """Store a tensor in the fewest bytes.

    Args:
        tensor: any shape and dtype.
        values: `"exact"` stores the values in the smallest dtype that holds each of them bit for bit. `"bf16"` and
            `"fp16"` round them; `"int8"` rounds them to 255 steps a row, with a scale for each row of a matrix.

    Returns:
        Its description and its parts.

    Raises:
        ValueError: if `values` is unknown, or would turn a value into an infinity.
    """
    if values not in get_args(Values):
        raise ValueError(f"values={values!r} is unknown: expected one of {list(get_args(Values))}.")
    scales = {}
    narrow = tensor.detach().cpu()
    if values == "exact":
        narrow = _narrowest(narrow)
    elif tensor.is_floating_point() and values == "int8":
        narrow, scales = _quantize(narrow)
    elif tensor.is_floating_point():
        narrow = _round(narrow, values)
    codec = smallest_codec(narrow)
    description = Description(codec, list(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    return description, {**CODECS[codec].encode(narrow), **scales}


def decode(description: Description, parts: dict[str, Tensor]) -> Tensor:
    """The tensor that `encode` stored.

    Raises:
        ValueError: if the parts do not fit the description.
    """
    tensor = CODECS[description.codec].decode(parts, torch.Size(description.shape))
    dtype = getattr(torch, description.dtype)
    if "scales" in parts:
        rows = tensor.reshape(len(parts["scales"]), -1).to(torch.float32)
        return (rows * parts["scales"][:, None]).to(dtype).view(description.shape)
    return tensor.to(dtype)


def sizes(tensor: Tensor) -> dict[str, int | None]:
    """How many bytes a tensor takes in each codec with exact values, in the smallest dtype that holds them; and under
    `int8` in the smallest codec with values of that kind; None where it does not fit."""
    narrow = _narrowest(tensor.detach().cpu())
    return {
        **{name: codec.size(narrow) for name, codec in CODECS.items()},
        "int8": sum(part.nbytes for part in encode(tensor, "int8")[1].values()) if tensor.isfinite().all() else None,
    }


def _narrowest(tensor: Tensor) -> Tensor:
    if tensor.dtype not in (torch.float32, torch.float64):
        return tensor
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        narrow = tensor.to(dtype)
        if _same_bits(narrow.to(tensor.dtype), tensor):
            return narrow
    return tensor


def _round(tensor: Tensor, values: str) -> Tensor:
    narrow = tensor.to(ROUNDED[values])
    lost = int((narrow.isinf() & ~tensor.isinf()).sum())
    if lost:
        raise ValueError(
            f"values={values!r} turns {lost} values into infinities, the largest of them {tensor.abs().max():g}: "
            "choose 'bf16', whose range is that of fp32, or 'exact'."
        )
    return narrow


def _quantize(tensor: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    rows = tensor.to(torch.float32).reshape(tensor.shape[0] if tensor.ndim > 1 else 1, -1)
    if not rows.isfinite().all():
        raise ValueError("values='int8' cannot hold NaN or infinity, which this tensor has: choose 'exact'.")
    scales = rows.abs().amax(1).div_(127) if rows.numel() else rows.new_zeros(len(rows))
    quantized = (rows / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round().to(torch.int8)
    return quantized.view(tensor.shape), {"scales": scales}


def _same_bits(a: Tensor, b: Tensor) -> bool:
    integers = {4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))
