"""What serves a SparseLinear: on a CPU the kernels, or a dense product where that is faster; else `gpu_serving`."""

from __future__ import annotations

import functools
import importlib.util
import warnings
import weakref
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

from .. import gemm
from . import gpu_serving
from .codecs import CODECS
from .storage import decode

if TYPE_CHECKING:
    from .kernels.layer import Layer
    from .kernels.layout import Kind, Packed
    from .linear import SparseLinear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of inputs that kernels compute with, in fp32."""
SMALL_PRODUCT = 5_000_000
"""Multiply-adds below which a dense product goes to MKL: oneDNN prepares each one."""
HAS_KERNELS = importlib.util.find_spec("numba") is not None
"""Whether Numba is installed."""


def is_possible(linear: SparseLinear) -> bool:
    """Whether there are kernels for the weight of a layer where it is now."""
    parts = linear.parts.values()
    return HAS_KERNELS and linear.description.dtype != "float64" and all(part.device.type == "cpu" for part in parts)


@functools.cache
def warn_that_it_is_slow() -> None:
    """Say once that weights are decoded in each call."""
    remedy = "on a CPU, pip install 'peft-pst[cpu]' brings the kernels that multiply without decoding"
    if HAS_KERNELS:
        remedy = "there are kernels for a CPU and inputs in fp32, bf16 and fp16"
    warnings.warn(
        "The model's sparse weights stay compressed and are decoded in each call, which takes little memory but is "
        f"slow: {remedy}; on an NVIDIA GPU since Ampere there are kernels too, with Triton 3.4; "
        "peft_pst.densify(model) makes them dense.",
        stacklevel=3,
    )


class Served:
    """The weight of a layer as the kernels read it."""

    def __init__(self, linear: SparseLinear) -> None:
        from .kernels.choice import COSTS, kernel_is_faster, kernel_may_be_faster, row_of

        self._linear = weakref.ref(linear)
        self._sizes = linear.in_features, linear.out_features
        kind, self._input_scales = _kind(linear), _scales(linear)[1]
        self._row_of, self._by_kernel = row_of, [False] * len(COSTS)
        # packing takes several times the memory of a dense weight for a while, as of a head without zeros
        if kernel_may_be_faster(self._sizes[::-1], kind, int(linear.parts["values"].count_nonzero())):
            self._by_kernel = kernel_is_faster(self.packed)
        self._dense: Tensor | None = None
        self._has_bias = linear.bias is not None

    @functools.cached_property
    def packed(self) -> Packed:
        """The weight and the bias."""
        from .kernels.layout import pack

        linear = self._linear()
        with torch.inference_mode(False):  # the bias is written again in later calls, of whatever mode
            return pack(_values(linear), _kind(linear), _scales(linear)[0], linear.bias)

    @functools.cached_property
    def _packed_bias(self) -> Tensor:
        return self.packed.bias[: self._sizes[1]]

    @functools.cached_property
    def _layer(self) -> Layer:
        from .kernels.layer import Layer

        return Layer(self.packed)

    @property
    def has_input_scales(self) -> bool:
        """Whether inputs are scaled before the product, as those of an int8 `Conv1D` are."""
        return self._input_scales is not None

    @property
    def is_of_use(self) -> bool:
        """Whether the kernels compute any number of tokens."""
        from .kernels.choice import COSTS

        return any(self.runs_by_kernel(cost.tokens) for cost in COSTS)

    def runs_by_kernel(self, tokens: int) -> bool:
        """Whether the kernels compute so many tokens, and not a dense product."""
        return self._by_kernel[self._row_of(tokens)]

    def refresh(self) -> None:
        """Write the bias of the layer, whose changes cannot be seen: none of `bias.data` raises a version."""
        bias = self._linear()._parameters["bias"]
        if bias is not None:
            self._packed_bias.copy_(bias)
            self._has_bias = True
        elif self._has_bias:
            self._packed_bias.zero_()
            self._has_bias = False

    def forward(self, x: Tensor) -> Tensor:
        """fp32 [..., in] to fp32 [..., out], without gradients.

        Raises:
            ValueError: if the input has another size.
        """
        size, out = self._sizes
        shape = x.shape
        if shape[-1] != size:
            raise wrong_input(x, size)
        flat = x if len(shape) == 2 else x.reshape(-1, size)
        y = self._by_kernel_or_dense(flat)
        return y if len(shape) == 2 else y.view(*shape[:-1], out)

    def _by_kernel_or_dense(self, x: Tensor) -> Tensor:
        if not self.runs_by_kernel(len(x)):
            return self._by_dense(x, self._linear())
        self.refresh()
        return self._layer(x if self._input_scales is None else x * self._input_scales)

    def _by_dense(self, x: Tensor, linear: SparseLinear) -> Tensor:
        if self._dense is None:
            weight = linear.weight.float()
            self._dense = (weight.T if linear.conv1d else weight).contiguous()
        bias = linear._parameters["bias"]
        if bias is not None and bias.dtype != torch.float32:
            bias = bias.float()
        product = F.linear if x.numel() * linear.out_features < SMALL_PRODUCT else gemm.linear
        return product(x, self._dense, bias)


def is_watched(x: Tensor) -> bool:
    """Whether more is asked of a call than its values: gradients, tangents or a graph."""
    return torch.is_grad_enabled() or is_in_a_graph(x) or is_transformed()


def is_in_a_graph(x: Tensor) -> bool:
    """Whether torch.compile, torch.export or the like see a call as an operation, or its tensor is of another kind."""
    return torch.compiler.is_compiling() or type(x) is not Tensor or torch._C._len_torch_dispatch_stack() > 0


def is_transformed() -> bool:
    """Whether torch.jit traces a call, or forward-mode AD or torch.func go through it: of what a kernel writes into
    memory they see nothing, and need a product that torch knows."""
    if torch.compiler.is_compiling():
        return False
    # of torch.autograd.forward_ad and torch.func no public function says it
    has_tangents = forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    return has_tangents or torch.jit.is_tracing()


def constant_weight(linear: SparseLinear) -> Tensor:
    """The dense weight for a call that is transformed, to which it is a constant: codecs read memory, too."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        with temporarily_clear_interpreter_stack():
            return linear.weight
    finally:
        torch._C._set_tracing_state(state)


def wrong_input(x: Tensor, in_features: int) -> ValueError:
    """What is wrong with an input of another size."""
    return ValueError(
        f"The input has shape {tuple(x.shape)}, but the layer reads {in_features} features: expected "
        f"[..., {in_features}]."
    )


def serve(linear: SparseLinear, x: Tensor) -> Tensor:
    """The forward of a layer that is served, differentiable: [..., in] to [..., out], in the dtype of x."""
    if is_in_a_graph(x):
        if torch.is_grad_enabled() and linear.bias is not None and linear.bias.requires_grad:
            return linear.plain(x)
        return torch.ops.peft_pst.sparse_linear(x, linear._handle)
    if torch.is_grad_enabled() and (x.requires_grad or (linear.bias is not None and linear.bias.requires_grad)):
        return _Product.apply(x, linear.bias, linear)
    return product(linear, x)


def product(linear: SparseLinear, x: Tensor) -> Tensor:
    """The forward of a layer that is served, without gradients."""
    served = linear.pack()
    return gpu_serving.product(linear, x) if served is None else served.forward(x.float()).to(x.dtype)


class _Product(torch.autograd.Function):
    """The product with gradients, for which the weight is decoded."""

    @staticmethod
    def forward(ctx: object, x: Tensor, bias: Tensor | None, linear: SparseLinear) -> Tensor:
        ctx.linear = linear
        return product(linear, x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        of_x, of_bias = ctx.needs_input_grad[:2]
        flat = grad.reshape(-1, grad.shape[-1])
        bias = flat.sum(0).to(ctx.linear.bias.dtype) if of_bias else None
        return gradient(ctx.linear, grad) if of_x else None, bias, None


def gradient(linear: SparseLinear, grad: Tensor) -> Tensor:
    """The gradient of the input, in the dtype of that of the output."""
    if linear.pack() is None:
        return gpu_serving.gradient(linear, grad)
    weight = linear.weight.to(grad.dtype)
    return grad @ (weight.T if linear.conv1d else weight)


def _kind(linear: SparseLinear) -> Kind:
    """Which values the kernels read."""
    from .kernels.layout import Kind

    if linear.compute == "fp16":
        return Kind.FP16
    if "scales" in linear.parts:
        return Kind.INT8
    return Kind.BF16 if linear.parts["values"].dtype == torch.bfloat16 else Kind.FP32


def _scales(linear: SparseLinear) -> tuple[Tensor | None, Tensor | None]:
    """The scales of the outputs and of the inputs, of values that the kernels read as they are stored."""
    scales = None if linear.compute == "fp16" else linear.parts.get("scales")
    return (None, scales) if linear.conv1d else (scales, None)


def _values(linear: SparseLinear) -> Tensor:
    """The values as a matrix [out, in], in the dtype of their kind."""
    parts = linear.parts
    if linear.compute == "fp16":
        matrix = _halved(linear)
    elif "scales" in parts:
        matrix = CODECS[linear.description.codec].decode(parts, torch.Size(linear.description.shape))
    else:
        bf16 = parts["values"].dtype == torch.bfloat16
        matrix = decode(linear.description, parts).to(torch.bfloat16 if bf16 else torch.float32)
    return (matrix.T if linear.conv1d else matrix).contiguous()


def _halved(linear: SparseLinear) -> Tensor:
    from .kernels.target import HAS_HALF

    weight = linear.weight
    halved = weight.half()
    if bool((halved.isinf() & ~weight.isinf()).any()):
        raise ValueError(
            f"compute='fp16' turns weights as large as {weight.abs().max():g} into infinities: choose 'fp32'."
        )
    if not HAS_HALF:
        _warn_of_no_half()
    return halved


@functools.cache
def _warn_of_no_half() -> None:
    warnings.warn(
        "compute='fp16' was asked for, but this processor has no AVX512-FP16: products are taken in fp32, with values "
        "in fp16.",
        stacklevel=2,
    )
