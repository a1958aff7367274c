"""The layers of an accelerated model that stay dense, such as a language model's head, by the faster library."""

from __future__ import annotations

from torch import Tensor, nn

from .. import gemm
from . import serving

LARGE = 2**20
"""Weights from which on a layer is worth it."""


class DenseProduct:
    """The forward of an `nn.Linear`, in the place of its own one: oneDNN's product where MKL's is slow."""

    def __init__(self, linear: nn.Linear) -> None:
        self._linear = linear

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        linear = self._linear
        weight = linear.weight
        if serving.is_watched(x) or x.dtype != weight.dtype or not weight.is_cpu:
            return nn.Linear.forward(linear, x)
        return gemm.linear(x, weight, linear.bias)


def speed_up_dense_layers(model: nn.Module) -> None:
    """Let the large dense layers of a model use the faster library, where the processor has a faster one."""
    if not gemm.prefers_onednn():
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.numel() >= LARGE and "forward" not in vars(module):
            module.forward = DenseProduct(module)


def restore_dense_layers(model: nn.Module) -> None:
    """The way back of `speed_up_dense_layers`."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), DenseProduct):
            del module.forward
