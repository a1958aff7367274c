"""Feed-forward blocks whose layers, and the activation between them, run as one call of the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from transformers import activations

from ..mode import evaluating
from . import serving
from .linear import SparseLinear

if TYPE_CHECKING:
    from .kernels.layer import Layer

ACTIVATIONS = {
    nn.ReLU: "relu",
    nn.GELU: "gelu",
    activations.GELUActivation: "gelu",
    activations.NewGELUActivation: "gelu_tanh",
    activations.FastGELUActivation: "gelu_tanh",
    activations.PytorchGELUTanh if hasattr(activations, "PytorchGELUTanh") else activations.GELUTanh: "gelu_tanh",
    nn.SiLU: "silu",
    activations.SiLUActivation if hasattr(activations, "SiLUActivation") else nn.SiLU: "silu",
    activations.QuickGELUActivation: "quick_gelu",
}
"""The kernels' name of an activation. Whether it is the right one is tried out, as is the rest of a block."""


class Names(NamedTuple):
    """Where the parts of a block are, and which method computes it."""

    first: str
    gate: str | None
    last: str
    activation: str
    method: str = "forward"


BLOCKS = (
    Names("up_proj", "gate_proj", "down_proj", "act_fn"),  # Llama and its like
    Names("wi_1", "wi_0", "wo", "act"),  # T5 since 1.1
    Names("wi", None, "wo", "act"),  # T5
    Names("c_fc", None, "c_proj", "act"),  # GPT-2
    Names("fc1", None, "fc2", "activation_fn"),  # Phi, CLIP
    Names("up_proj", None, "down_proj", "act_fn"),
    Names(
        "intermediate.dense", None, "output.dense", "intermediate.intermediate_act_fn", "feed_forward_chunk"
    ),  # BERT
)


class FeedForward:
    """The forward of a block, in the place of its own one: y = W act(F x) or W (act(G x) · (F x)) in one call.

    Where that does not serve, as with gradients, in a graph, or when one of the modules has a hook or is another by
    now, the block's own method computes it.
    """

    def __init__(self, block: nn.Module, names: Names) -> None:
        self._block, self._method = block, names.method
        self.layers = [block.get_submodule(name) for name in (names.first, names.gate, names.last) if name]
        self._activation = ACTIVATIONS[type(block.get_submodule(names.activation))]
        self._steps = list(_steps(block, [name for name in names[:4] if name]))
        self._made_of: list[serving.Served] = []
        self._layer: Layer | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]; of a BERT layer with its residual connection and norm."""
        if serving.is_watched(x) or x.dtype not in serving.DTYPES or self._block.training or x.device.type != "cpu":
            return self.apart(x)
        if not all(parent._modules[name] is module and not _has_hooks(module) for parent, name, module in self._steps):
            return self.apart(x)
        tokens = x.numel() // x.shape[-1]
        served = [layer.pack() for layer in self.layers]
        if not all(one is not None and one.runs_by_kernel(tokens) for one in served):
            return self.apart(x)
        return self.as_one(x, served)

    def apart(self, x: Tensor) -> Tensor:
        """The block's own method."""
        return getattr(type(self._block), self._method)(self._block, x)

    def as_one(self, x: Tensor, served: list[serving.Served]) -> Tensor:
        """One call of the kernels, and what the method does around it."""
        if self._made_of != served:
            from .kernels.layer import Layer

            first, *gate, last = (one.packed for one in served)
            self._layer = Layer(last, first, gate[0] if gate else None, self._activation)
            self._made_of = served
        for one in served:
            one.refresh()
        flat = x.detach().reshape(-1, x.shape[-1])
        y = self._layer(flat if x.dtype == torch.float32 else flat.float())
        y = y.to(x.dtype).view(*x.shape[:-1], self.layers[-1].out_features)
        if self._method == "forward":
            return y
        output = self._block.output
        return output.LayerNorm(output.dropout(y) + x)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_made_of": [], "_layer": None}


def _steps(block: nn.Module, names: list[str]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """From a block to its submodules: each module on the way, beside its parent and its name there."""
    for name in names:
        parent = block
        for part in name.split("."):
            module = parent.get_submodule(part)
            yield parent, part, module
            parent = module


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def fuse_feed_forward(model: nn.Module) -> None:
    """Let every feed-forward block whose layers are `SparseLinear` run as one, where that computes the same."""
    for block in model.modules():
        names = next((names for names in BLOCKS if _fits(block, names)), None)
        if names is None or names.method in vars(block):
            continue
        fused = FeedForward(block, names)
        if _computes_the_same(fused, block):
            setattr(block, names.method, fused)


def separate_feed_forward(model: nn.Module) -> None:
    """The way back of `fuse_feed_forward`."""
    for block in model.modules():
        for name in [name for name, value in vars(block).items() if isinstance(value, FeedForward)]:
            delattr(block, name)


def _fits(block: nn.Module, names: Names) -> bool:
    """Whether a module has these layers, sparse and on the kernels, this activation, and nothing but dropout."""
    modules = dict(block.named_modules())
    layers = [modules.get(name) for name in (names.first, names.gate, names.last) if name]
    if not all(isinstance(layer, SparseLinear) and layer.pack() and layer.pack().is_of_use for layer in layers):
        return False
    if type(modules.get(names.activation)) not in ACTIVATIONS or not hasattr(block, names.method):
        return False
    if any(layer.pack().has_input_scales for layer in layers):
        return False
    known = {*layers, modules[names.activation]}
    rest = [child for child in block.children() if child not in known and not isinstance(child, nn.Dropout)]
    return names.method != "forward" or not rest


@torch.no_grad()
def _computes_the_same(fused: FeedForward, block: nn.Module) -> bool:
    """Whether the block as one is the block apart, on random tokens."""
    layers = fused.layers
    x = torch.randn(3, layers[0].in_features, generator=torch.Generator().manual_seed(0))
    x = x.to(next(block.parameters(), x).dtype)
    with evaluating(block):
        expected, found = fused.apart(x).float(), fused.as_one(x, [layer.pack() for layer in layers]).float()
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
