"""SparseLinear: a linear layer that keeps its weight as the parts of a codec."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .storage import Description, Values, decode, encode

PREFIX = "weight_"


class SparseLinear(nn.Module):
    """y = W x + b with W stored; the parts of its codec are the buffers `weight_<part>`.

    The forward decodes the whole weight: right on any device, but slower than a dense layer.

    Args:
        description: how the weight is stored. Its shape is [out, in], or [in, out] as transformers' `Conv1D` has it.
        parts: the parts of the weight; on the meta device they wait for a checkpoint.
        bias: [out], or None.
        conv1d: whether the weight is [in, out].
    """

    def __init__(
        self, description: Description, parts: dict[str, Tensor], bias: nn.Parameter | None, conv1d: bool = False
    ) -> None:
        super().__init__()
        self.description, self.conv1d = description, conv1d
        self.part_names = tuple(parts)
        for name, part in parts.items():
            self.register_buffer(PREFIX + name, part)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear | Conv1D, values: Values = "exact") -> SparseLinear:
        """Store the weight of a linear layer in the fewest bytes; see `storage.encode` for `values`.

        Raises:
            TypeError: if it is neither `nn.Linear` nor `Conv1D`.
            ValueError: if the values cannot be stored that way.
        """
        if not isinstance(linear, (nn.Linear, Conv1D)):
            raise TypeError(
                f"SparseLinear.from_linear got a {type(linear).__name__}: expected torch.nn.Linear or transformers' "
                "Conv1D. Merge an adapter first, with merge_and_unload()."
            )
        description, parts = encode(linear.weight, values)
        device = linear.weight.device
        parts = {name: part.to(device) for name, part in parts.items()}
        return cls(description, parts, linear.bias, isinstance(linear, Conv1D))

    @property
    def out_features(self) -> int:
        """How many outputs the layer has."""
        return self.description.shape[1 if self.conv1d else 0]

    @property
    def in_features(self) -> int:
        """How many inputs the layer has."""
        return self.description.shape[0 if self.conv1d else 1]

    @property
    def weight(self) -> Tensor:
        """The dense weight, decoded anew: it has no gradient, and writing to it changes nothing."""
        parts = {name: getattr(self, PREFIX + name) for name in self.part_names}
        device = next(iter(parts.values())).device
        return decode(self.description, {name: part.cpu() for name, part in parts.items()}).to(device)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in the dtype of x."""
        weight = self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, weight.T if self.conv1d else weight, bias)

    def to_linear(self) -> nn.Linear | Conv1D:
        """The dense layer again."""
        with torch.device("meta"):
            if self.conv1d:
                linear = Conv1D(self.out_features, self.in_features)
            else:
                linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight, linear.bias = nn.Parameter(self.weight), self.bias
        return linear

    def extra_repr(self) -> str:
        """The shape and the codec."""
        return f"in_features={self.in_features}, out_features={self.out_features}, codec={self.description.codec}"

    def _apply(self, fn: object, recurse: bool = True) -> SparseLinear:
        # a cast of the model concerns what is computed with, not how the values are stored
        dtypes = {name: getattr(self, PREFIX + name).dtype for name in self.part_names}
        before = {name: getattr(self, PREFIX + name) for name in self.part_names}
        super()._apply(fn, recurse)
        for name, dtype in dtypes.items():
            after = getattr(self, PREFIX + name)
            if after.dtype != dtype:
                setattr(self, PREFIX + name, before[name].to(after.device))
        return self
