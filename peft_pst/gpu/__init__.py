"""Kernels for GPUs, in Triton 3.4 or later, which torch's builds for CUDA bring since torch 2.8. Under Triton's
interpreter (TRITON_INTERPRET=1) they run on a CPU as well, slowly: there the tests prove them."""

import functools
import importlib.util
import inspect
import os

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def has_kernels(device: torch.device) -> bool:
    """Whether tensors of a device go through the kernels."""
    if not HAS_TRITON:
        return False
    return _is_able(device) if device.type == "cuda" else os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _is_able(device: torch.device) -> bool:
    import triton.language as tl

    if "mask" not in inspect.signature(tl.histogram).parameters:  # before Triton 3.4, which torch 2.8 brings
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
