"""SparseLinear: a linear layer that keeps its weight as the parts of a codec, and multiplies without decoding it."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import gpu_serving, operations, semi_structured, serving
from .storage import Description, Values, decode, encode

PREFIX = "weight_"
Compute = Literal["fp32", "fp16"]


class SparseLinear(nn.Module):
    """y = W x + b with W stored; the parts of its codec are the buffers `weight_<part>`.

    On a CPU, with the extra `peft-pst[cpu]`, the kernels multiply with W as it is: it is packed for them at the first
    call, or by `pack()`. For shapes, numbers of tokens and densities at which a dense product is faster, the dense
    weight is kept beside it and used. On an NVIDIA GPU since Ampere, with Triton 3.4, a kernel multiplies up to 16
    tokens with W as it is, and for more W is dense for the time of the product. For so many that it seems faster, a
    2:4 weight whose sizes divide by 64 is there, in bf16 and fp16 and without gradients, one of torch's
    semi-structured sparse tensors, which is kept beside it. Elsewhere each call decodes the whole weight, which is
    slow.

    Args:
        description: how the weight is stored. Its shape is [out, in], or [in, out] as transformers' `Conv1D` has it.
        parts: the parts of the weight; on the meta device they wait for a checkpoint.
        bias: [out], or None.
        conv1d: whether the weight is [in, out].
        compute: what products of 16 tokens or more are taken in, `"fp32"` or `"fp16"`.
    """

    def __init__(
        self,
        description: Description,
        parts: dict[str, Tensor],
        bias: nn.Parameter | None,
        conv1d: bool = False,
        compute: Compute = "fp32",
    ) -> None:
        super().__init__()
        self.description, self.conv1d, self.compute = description, conv1d, compute
        self.part_names = tuple(parts)
        for name, part in parts.items():
            self.register_buffer(PREFIX + name, part)
        self.register_parameter("bias", bias)
        self._served: serving.Served | None = None
        self._on_gpu: semi_structured.OnGPU | None = None
        self._tiles: gpu_serving.Tiles | None = None
        self._handle = operations.register(self)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear | Conv1D, values: Values = "exact", compute: Compute = "fp32"
    ) -> SparseLinear:
        """Store the weight of a linear layer in the fewest bytes.

        Args:
            linear: `nn.Linear`, or transformers' `Conv1D`.
            values: `"exact"`, or `"bf16"`, `"fp16"`, `"int8"` to round them; see `storage.encode`.
            compute: `"fp16"` takes the products of 16 tokens or more in fp16, with values rounded to it, where the
                processor has AVX512-FP16 (elsewhere in fp32, which is said once). The sums of a tile are in fp16 too:
                a relative error of about 1e-3, and what exceeds 65,504 becomes infinite.

        Raises:
            TypeError: if it is neither `nn.Linear` nor `Conv1D`.
            ValueError: if the values cannot be stored that way, or `compute` is unknown.
        """
        if not isinstance(linear, (nn.Linear, Conv1D)):
            raise TypeError(
                f"SparseLinear.from_linear got a {type(linear).__name__}: expected torch.nn.Linear or transformers' "
                "Conv1D. Merge an adapter first, with merge_and_unload()."
            )
        if compute not in get_args(Compute):
            raise ValueError(f"compute={compute!r} is unknown: expected one of {list(get_args(Compute))}.")
        description, parts = encode(linear.weight, values)
        device = linear.weight.device
        parts = {name: part.to(device) for name, part in parts.items()}
        return cls(description, parts, linear.bias, isinstance(linear, Conv1D), compute).train(linear.training)

    @property
    def out_features(self) -> int:
        """How many outputs the layer has."""
        return self.description.shape[1 if self.conv1d else 0]

    @property
    def in_features(self) -> int:
        """How many inputs the layer has."""
        return self.description.shape[0 if self.conv1d else 1]

    @property
    def parts(self) -> dict[str, Tensor]:
        """The parts of the weight, by name."""
        return {name: getattr(self, PREFIX + name) for name in self.part_names}

    @property
    def weight(self) -> Tensor:
        """The dense weight, decoded anew: it has no gradient, and writing to it changes nothing."""
        parts = self.parts
        device = next(iter(parts.values())).device
        return decode(self.description, {name: part.cpu() for name, part in parts.items()}).to(device)

    def pack(self) -> serving.Served | None:
        """The weight as the kernels read it, made once; None where there are no kernels for it."""
        if self._served is None and serving.is_possible(self):
            self._served = serving.Served(self)
        return self._served

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in the dtype of x.

        Raises:
            ValueError: if the last dimension of x is not `in_features`.
        """
        served = self._served
        # what a server calls goes the shortest way: a call from Python takes as long as some products
        if served is not None and x.dtype == torch.float32 and x.is_cpu and not serving.is_watched(x):
            return served.forward(x)
        if serving.is_transformed():
            return self.plain(x)
        if x.shape[-1] != self.in_features:
            raise serving.wrong_input(x, self.in_features)
        if x.dtype in serving.DTYPES and x.is_cpu and (served is not None or serving.is_possible(self)):
            return serving.serve(self, x)
        if semi_structured.is_possible(self, x):
            return semi_structured.product(self, x)
        if x.dtype in serving.DTYPES and gpu_serving.is_possible(self, x):
            if torch.compiler.is_dynamo_compiling():
                self._make_tiles()
            return serving.serve(self, x.to(semi_structured.product_dtype(x)))
        serving.warn_that_it_is_slow()
        return self.plain(x)

    @torch.compiler.assume_constant_result  # a compiler runs it where it traces: later a CUDA graph owns what is made
    def _make_tiles(self) -> None:
        gpu_serving.in_tiles(self)

    def plain(self, x: Tensor) -> Tensor:
        """The forward by the decoded weight, on any device and in any dtype."""
        weight = serving.constant_weight(self) if serving.is_transformed() else self.weight
        weight = weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, weight.T if self.conv1d else weight, bias)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear | Conv1D:
        """The dense layer again, its weight in some dtype: None for the one that it had when it was stored."""
        with torch.device("meta"):
            if self.conv1d:
                linear = Conv1D(self.out_features, self.in_features)
            else:
                linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight, linear.bias = nn.Parameter(self.weight.to(dtype)), self.bias
        return linear

    def extra_repr(self) -> str:
        """The shape and the codec."""
        return f"in_features={self.in_features}, out_features={self.out_features}, codec={self.description.codec}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_served": None, "_on_gpu": None, "_tiles": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._handle = operations.register(self)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._served = self._on_gpu = self._tiles = None
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: object, recurse: bool = True) -> SparseLinear:
        # a cast of the model concerns what is computed with, not how the values are stored
        before = self.parts
        self._served = self._on_gpu = self._tiles = None
        super()._apply(fn, recurse)
        for name, part in before.items():
            after = getattr(self, PREFIX + name)
            if after.dtype != part.dtype:
                setattr(self, PREFIX + name, part.to(after.device))
        return self
