"""Norm: a normalisation layer whose scale and bias train with the adapter."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call

from .blocks import block_lists, outermost
from .layer import check_one_adapter
from .parameters import Start
from .sharded import assign, gathered, need, whole_shape

if TYPE_CHECKING:
    from .config import PSTConfig

PREFIX = "pst_norm_"
"""Of the parameters of an adapter here, before the name of the layer's own."""


class Norm(nn.Module, BaseTunerLayer):
    """A normalisation layer with the changes that the adapters make to it: the scale is weight + Δweight, the bias, if
    there is one, bias + Δbias. Pruning changes the size of activations, and these few numbers set it right (PERP,
    arXiv 2312.15230, section 3).

    For each adapter it holds `pst_norm_weight` and `pst_norm_bias`, float32 in the shapes of the layer's, from 0.
    """

    adapter_layer_names = (f"{PREFIX}weight", f"{PREFIX}bias")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict({}))
        self.merged_adapters = []
        self._disable_adapters = False
        self._dense: dict[str, Tensor] = {}
        self._plain = (_Forward(base_layer),)  # a tuple, or it would be a submodule

    def update_layer(self, adapter_name: str, config: PSTConfig) -> None:
        """Add an adapter, which changes nothing yet."""
        for name, parameter in self._own().items():
            start = Start(tuple(whole_shape(parameter))).draw(random=not config.init_weights)
            getattr(self, PREFIX + name)[adapter_name] = nn.Parameter(start)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _own(self) -> dict[str, nn.Parameter]:
        own = dict(self.base_layer.named_parameters(recurse=False))
        return {name: own[name] for name in ("weight", "bias") if name in own}

    def changed(self, adapter_name: str) -> dict[str, Tensor]:
        """The scale and the bias with the changes of an adapter, in the layer's dtype."""
        found = {}
        for name, parameter in self._own().items():
            whole, change = gathered(parameter), gathered(getattr(self, PREFIX + name)[adapter_name])
            found[name] = (whole + change).to(whole.dtype)
        return found

    def effective(self) -> dict[str, Tensor]:
        """The scale and the bias that the layer computes with."""
        active = None if self.disable_adapters or self.merged else self._active
        return dict(self._own()) if active is None else self.changed(active)

    @property
    def _active(self) -> str | None:
        own = [name for name in self.active_adapters if name in self.pst_norm_weight]
        check_one_adapter(own)
        return own[0] if own else None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer gives with the changes of the active adapter."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapter_name = self._active
        if self.disable_adapters or self.merged or adapter_name is None:
            return self.base_layer(*args, **kwargs)
        changed = {f"layer.{name}": value for name, value in self.changed(adapter_name).items()}
        return functional_call(self._plain[0], changed, args, kwargs)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Change the layer itself; what it was is kept for `unmerge`.

        Args:
            safe_merge: check for NaN and infinity before.
            adapter_names: the adapter to merge; by default the active one.

        Raises:
            ValueError: if two adapters would be merged into this layer, or `safe_merge` finds a value not finite.
        """
        adapter_names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.pst_norm_weight]
        check_one_adapter([*self.merged_adapters, *adapter_names])
        for adapter_name in adapter_names:
            changed = self.changed(adapter_name)
            if safe_merge and not all(torch.isfinite(value).all() for value in changed.values()):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken: its change "
                    "of a normalisation layer is not finite everywhere. Train again with a lower learning rate."
                )
            self._dense = {name: assign(parameter, changed[name]) for name, parameter in self._own().items()}
            self.merged_adapters.append(adapter_name)

    def unmerge(self) -> None:
        """Put the layer's own scale and bias back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for name, parameter in self._own().items():
            assign(parameter, self._dense[name])
        self._dense = {}
        self.merged_adapters.clear()

    def train(self, mode: bool = True) -> Norm:
        """Set training or evaluation mode."""
        need(self, self.parameters())
        return super().train(mode)

    def __repr__(self) -> str:
        return "pst." + super().__repr__()


class _Forward(nn.Module):
    """A layer's forward without its hooks: those of ZeRO-3 look for the parameters that are replaced here."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.layer.forward(*args, **kwargs)


def find_norms(model: nn.Module, targets: Iterable[str]) -> list[str]:
    """The names of the normalisation layers with a scale in the blocks that the target modules are in."""
    modules = dict(model.named_modules())
    lists = block_lists(modules)
    blocks = {block for block in (_block(name, lists) for name in targets) if block is not None}
    norms = [name for name, module in modules.items() if _is_norm(module) and not name.endswith(".base_layer")]
    return [name for name in norms if _block(name, lists) in blocks]


def _block(name: str, lists: list[str]) -> str | None:
    prefix = outermost(name, lists)
    return None if prefix is None else prefix + name[len(prefix) :].partition(".")[0]


def _is_norm(module: nn.Module) -> bool:
    named = isinstance(module, Norm) or re.search(r"(Layer|RMS|Group)Norm$", type(module).__name__) is not None
    return named and isinstance(getattr(module, "weight", None), nn.Parameter)
