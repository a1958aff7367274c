"""2:4 weights on a GPU as torch's semi-structured sparse tensors, where a product gains by them.

`PRODUCT`, from which on they are used, is NOT measured: no GPU was at hand. It is cautious. Torch's users report
semi-structured products slower than dense ones at one token (pytorch issue 111339), and, for what torch does around
each call, up to some thousand tokens (issue 153825, pull request 177866). `benchmarks/gpu/semi_structured.py` measures
it anew on a GPU and prints the figure to put here.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .serving import is_in_a_graph

if TYPE_CHECKING:
    from .linear import SparseLinear

PRODUCT = 2**37
"""Multiply-adds of the dense product, out x in x tokens, from which on the semi-structured one is used: 8,192 tokens
at 4096x4096."""
DTYPES = (torch.bfloat16, torch.float16)
"""Of inputs; in fp32 torch's pattern is 1:2."""
CAPABILITY = (8, 0)
"""The first GPUs with units for 2:4, Ampere."""
MULTIPLE = 64
"""Both sizes of a weight divide by it. cuSPARSELt needs 16; CUTLASS, for those who ask torch for it, 32 and 64. Torch
pads the tokens itself."""


@functools.cache
def is_able(device: torch.device) -> bool:
    """Whether a device has units for 2:4, and torch what reaches them: an NVIDIA GPU since Ampere, and cuSPARSELt."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.backends.cusparselt.is_available()
        and torch.cuda.get_device_capability(device) >= CAPABILITY
    )


def fits(shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether torch takes a 2:4 weight [out, in] with inputs of that dtype."""
    return dtype in DTYPES and not any(size % MULTIPLE for size in shape)


def is_faster(shape: tuple[int, int], tokens: int) -> bool:
    """Whether the semi-structured product of a weight [out, in] with so many tokens seems faster than the dense."""
    out, size = shape
    return out * size * tokens >= PRODUCT


def is_two_of_four(matrix: Tensor) -> bool:
    """Whether each group of four along the rows of a matrix, whose length divides by four, has two values or fewer."""
    return bool(((matrix.reshape(-1, 4) != 0).sum(1) <= 2).all())


def is_possible(linear: SparseLinear, x: Tensor) -> bool:
    """Whether a layer's product runs here: it gains, the weight is 2:4 and on the input's GPU, nothing is recorded."""
    if is_in_a_graph(x) or not is_able(x.device):
        return False
    # first of all: a model that decodes is not to read its weights on the host for a product that it never takes
    if not is_faster(_shape(linear), x.shape[:-1].numel()):
        return False
        return False
    # first of all: a model that decodes is not to read its weights on the host for a product that it never takes
    if not is_faster(_shape(linear), x.shape[:-1].numel()):
        return False
    bias = linear.bias
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    if not fits(_shape(linear), product_dtype(x)) or any(part.device != x.device for part in linear.parts.values()):
        return False
    if linear._on_gpu is None:
        linear._on_gpu = OnGPU(linear)
    return linear._on_gpu.is_two_of_four


def product(linear: SparseLinear, x: Tensor) -> Tensor:
    """[..., in] to [..., out], without gradients, in the dtype of x or the one that autocast asks for."""
    # cuSPARSELt is not told strides: torch takes what is not contiguous for the transpose of what is
    flat = x.to(product_dtype(x)).reshape(-1, linear.in_features).contiguous()
    weight = linear._on_gpu.weight(linear, flat.dtype)
    bias = None if linear.bias is None else linear.bias.to(flat.dtype)
    return F.linear(flat, weight, bias).view(*x.shape[:-1], linear.out_features)


class OnGPU:
    """The weight of a layer as torch's semi-structured tensor, made at the first call in a dtype and kept beside the
    stored parts: 9/16 of the bytes of the dense weight."""

    def __init__(self, linear: SparseLinear) -> None:
        # the codec may say it; not of a Conv1D, whose groups lie across its rows, nor where values happen to be zero
        stored_so = linear.description.codec == "2:4" and not linear.conv1d
        self.is_two_of_four = stored_so or is_two_of_four(_matrix(linear))
        self._made: dict[torch.dtype, Tensor] = {}

    def weight(self, linear: SparseLinear, dtype: torch.dtype) -> Tensor:
        """[out, in]."""
        if dtype not in self._made:
            self._made[dtype] = torch.sparse.to_sparse_semi_structured(_matrix(linear).to(dtype))
        return self._made[dtype]


def _shape(linear: SparseLinear) -> tuple[int, int]:
    return linear.out_features, linear.in_features


def product_dtype(x: Tensor) -> torch.dtype:
    """What `F.linear` would compute in."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def _matrix(linear: SparseLinear) -> Tensor:
    weight = linear.weight
    return (weight.T if linear.conv1d else weight).contiguous()
