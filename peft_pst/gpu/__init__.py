"""Kernels for GPUs, in Triton, which torch's builds for CUDA bring. Under Triton's interpreter (TRITON_INTERPRET=1)
they run on a CPU as well, slowly: there the tests prove them."""

import functools
import importlib.util
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
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
