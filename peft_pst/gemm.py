"""The large matrix products of the step, by the faster of the two libraries that torch carries for fp32 on a CPU.

torch hands fp32 products to MKL. On processors that are not Intel's, MKL reaches less than half the speed of oneDNN,
which torch carries as well but keeps for other dtypes; `benchmarks/training_step.py` measures the step with both.
"""

import functools
import platform

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def prefers_onednn() -> bool:
    """Whether this machine multiplies fp32 matrices faster with oneDNN: it has MKL, but not Intel's processor."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        with open("/proc/cpuinfo") as file:
            vendor = file.read()
    except OSError:
        vendor = platform.processor()
    return "GenuineIntel" not in vendor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b like `torch.nn.functional.linear`, without autograd. x [tokens, in], weight [out, in], bias [out]."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and prefers_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
