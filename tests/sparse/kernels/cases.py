"""Random weights and activations for the kernels, and what they should compute, in float64."""

import functools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_pst.sparse.kernels.layout import Kind, Packed, pack
from peft_pst.sparse.kernels.target import HAS_HALF, LANES, WIDEST

DTYPES = {Kind.FP32: torch.float32, Kind.BF16: torch.bfloat16, Kind.INT8: torch.int8, Kind.FP16: torch.float16}

FUNCTIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class Weight(NamedTuple):
    values: Tensor
    kind: Kind
    scales: Tensor | None
    bias: Tensor | None

    def pack(self) -> Packed:
        return pack(*self)

    def reference(self, x: Tensor) -> Tensor:
        """In float64, over the stored values only: an infinity touches no output that has no value for it."""
        values, x = self.values.double().numpy(), x.double().numpy()
        if np.isfinite(values).all() and np.isfinite(x).all():
            y = x @ values.T
        else:
            y = np.zeros((len(x), len(values)))
            with np.errstate(invalid="ignore"):
                for row, stored in enumerate(values != 0):
                    y[:, row] = (x[:, stored] * values[row, stored]).sum(1)
        if self.scales is not None:
            y = y * self.scales.double().numpy()
        return torch.from_numpy(y if self.bias is None else y + self.bias.double().numpy())

    def allowed(self, x: Tensor, packed: Packed) -> float:
        """The largest error: what fp32 makes of sums that may cancel, and half a step of a token in 16 bits; in fp16
        each token and each of the sums of a row is rounded to 11 bits."""
        values, scales = self.values.double().abs(), 1.0 if self.scales is None else self.scales.double()
        terms = x.double().abs() @ values.T * scales + (0 if self.bias is None else self.bias.double().abs())
        allowed = max(1e-6 * float(self.reference(x).abs().max()), 2e-7 * float(terms.max()))
        if has_16_bits(packed, len(x)):
            allowed += float(x.double().abs().max()) / 65534 * float((values.sum(1) * scales).max())
        if in_half(packed, len(x)):
            allowed += 2**-11 * (2 + float((values > 0).sum(1).max()) ** 0.5) * float(terms.max())
        return allowed


def make(out, size, density, kind=Kind.FP32, blocks=False, bias=True, seed=0, empty=False) -> Weight:
    """A random weight; `blocks` of 8x1, and `empty` rows and columns."""
    generator = torch.Generator().manual_seed(seed)
    rows = -(-out // 8) if blocks else out
    mask = torch.rand(rows, size, generator=generator) < density
    if blocks:
        mask = mask.repeat_interleave(8, 0)[:out]
    if empty:
        mask[torch.arange(out) // (8 if blocks else 1) % 3 == 0] = False
        mask[:, size // 3 : size // 3 + 40] = False
    if kind is Kind.INT8:
        values = torch.randint(-127, 128, (out, size), generator=generator).to(torch.int8)
        scales = torch.rand(out, generator=generator) / 100 + 1e-4
    else:
        values, scales = torch.randn(out, size, generator=generator).to(DTYPES[kind]), None
    values[values == 0] = 1  # so that the mask alone says what is stored
    values = values.masked_fill(~mask, 0)
    return Weight(values, kind, scales, torch.randn(out, generator=generator) if bias else None)


def has_16_bits(packed: Packed, tokens: int) -> bool:
    """Whether some token is multiplied in 16 bits: one that has a panel of its own, of a weight with a bitmask."""
    return packed.bits is not None and tokens % WIDEST == 1


def in_half(packed: Packed, tokens: int) -> bool:
    """Whether some tokens are multiplied in fp16, on a processor that can."""
    return HAS_HALF and packed.kind is Kind.FP16 and tokens > LANES // 2


def allowed_error(tokens: int, *weights: Packed, exact: float = 1e-6) -> float:
    """What `error` may be: `exact` for sums in fp32."""
    if any(in_half(packed, tokens) for packed in weights):
        return 4e-3 * len(weights)
    return 1e-4 if any(has_16_bits(packed, tokens) for packed in weights) else exact


def error(y: Tensor, expected: Tensor) -> float:
    """The largest error, as a part of the largest number."""
    return float((y - expected).abs().max() / expected.abs().max())
