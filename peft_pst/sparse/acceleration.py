"""accelerate_sparse: the kernels under a whole model."""

from __future__ import annotations

import ctypes
import sys

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..gpu import has_kernels
from .dense_product import speed_up_dense_layers
from .feed_forward import fuse_feed_forward
from .linear import SparseLinear
from .serving import HAS_KERNELS, warn_that_it_is_slow

MOST_DENSE = 0.6
"""Of a dense layer, the share of weights above which it is left alone: no number of tokens gains from its zeros."""


def accelerate_sparse(model: nn.Module) -> nn.Module:
    """Put the sparse kernels under a model, in place: it computes the same, faster on a CPU; on an NVIDIA GPU since
    Ampere its weights stay compressed in the memory of the device.

    Every `nn.Linear` and `Conv1D` with enough zeros becomes a `SparseLinear`, with exact values; those whose weight is
    shared with an embedding stay. On a CPU, where a block's feed-forward layers are sparse, they and the activation
    between them run as one; large layers that stay dense, such as a head, use oneDNN where MKL is slow. `densify` is
    the way back.

    Args:
        model: a merged model, or one opened from a sparse checkpoint.

    Returns:
        The same model.

    Raises:
        ImportError: if it is on a CPU and Numba is not installed.
        ValueError: if no linear layer of the model has enough zeros, or there are no kernels for its device.
    """
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    without = sorted(str(device) for device in devices if device.type != "cpu" and not has_kernels(device))
    if without:
        raise ValueError(
            f"The model is on {without}, which has no kernels: expected a CPU, or an NVIDIA GPU since Ampere with "
            "Triton 3.4 or later. model.to('cpu') moves it."
        )
    if not HAS_KERNELS and not all(has_kernels(device) for device in devices):
        raise ImportError("The sparse kernels need Numba: pip install 'peft-pst[cpu]'.")
    shared = _shared_weights(model)
    for name, module in list(model.named_modules()):
        if type(module) in (nn.Linear, Conv1D) and id(module.weight) not in shared and _is_sparse(module):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, SparseLinear.from_linear(module))
    if not any(_is_served(module) for module in model.modules() if isinstance(module, SparseLinear)):
        raise ValueError(
            "The model has no linear layer with enough zeros for sparse kernels: expected one that was merged from a "
            f"sparse training, or has at most {MOST_DENSE:.0%} of its weights left."
        )
    _speed_up_the_rest(model)
    return model


def accelerate_opened(model: nn.Module) -> None:
    """The same for a model that was just opened from a sparse checkpoint, as far as it can be."""
    sparse = [module for module in model.modules() if isinstance(module, SparseLinear)]
    if not all(map(_is_served, sparse)):
        warn_that_it_is_slow()
    elif sparse:
        _speed_up_the_rest(model)


def _is_served(linear: SparseLinear) -> bool:
    return linear.pack() is not None or all(has_kernels(part.device) for part in linear.parts.values())


def _speed_up_the_rest(model: nn.Module) -> None:
    fuse_feed_forward(model)
    speed_up_dense_layers(model)
    _return_memory()


def _return_memory() -> None:
    """Give what packing freed back to the system: glibc keeps it, and it is more than the packed model takes."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries do not have it
        if trim is not None:
            trim(0)


def _is_sparse(linear: nn.Linear | Conv1D) -> bool:
    weight = linear.weight
    return weight.numel() > 0 and int(weight.count_nonzero()) <= MOST_DENSE * weight.numel()


def _shared_weights(model: nn.Module) -> set[int]:
    """The identities of parameters that more than one module has, as a head that is tied to an embedding."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {identity for identity, count in owners.items() if count > 1}
