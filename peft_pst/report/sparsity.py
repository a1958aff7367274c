"""Which weights of a model count, and how many of their entries are zero."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..boost import Boosted
from ..layer import PSTLayer
from ..model import is_plain_linear
from ..norm import Norm
from ..sparse.linear import SparseLinear


class TensorSparsity(NamedTuple):
    """How many of a weight's entries are zero."""

    name: str
    numel: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return self.zeros / self.numel


def tensor_sparsity(model: nn.Module, names: Iterable[str] | None = None) -> list[TensorSparsity]:
    """The sparsity of weights, in the order of the model.

    Args:
        model: a model with PST layers, merged or not, one opened from a sparse checkpoint, or any other.
        names: the names of the modules whose weights count. By default the PST targets; in a model without PST
            layers all linear layers.

    Returns:
        One row a weight. What an adapter prunes but has not merged counts as zeros.
    """
    modules = dict(model.named_modules())
    return [_row(name, modules[name]) for name in names or weight_names(model)]


def weight_names(model: nn.Module) -> list[str]:
    """The modules whose weights are the PST targets; in a model without PST layers all linear layers. A layer with a
    low-rank boost has the name that it had before it was merged."""
    modules = dict(model.named_modules())
    targets = [name for name, module in modules.items() if isinstance(module, PSTLayer)]
    inner = {f"{name}.linear" for name, module in modules.items() if isinstance(module, Boosted)}
    linear = [
        name
        for name, module in modules.items()
        if name not in inner and (isinstance(module, (SparseLinear, Boosted)) or is_plain_linear(module))
    ]
    return targets or linear


def effective_weight(module: nn.Module) -> Tensor:
    """The weight that a layer computes with, [out, in]: what an adapter prunes is zero. A boost is not in it."""
    if isinstance(module, Boosted):
        return effective_weight(module.linear)
    if _prunes(module):
        return module.masked_weight(module.active_pst_adapter)
    base = module.get_base_layer() if isinstance(module, PSTLayer) else module
    weight = module.frozen_weight() if isinstance(module, PSTLayer) else base.weight
    transposed = isinstance(base, Conv1D) or (isinstance(base, SparseLinear) and base.conv1d)
    return weight.detach().T if transposed else weight.detach()


def boost_of(name: str, module: nn.Module) -> dict[str, Tensor]:
    """The tensors of the low-rank boost that a layer computes with, by their names in a merged model; none if it has
    no boost.

    Args:
        name: of the layer.
    """
    S, P = None, None
    inner = {}
    if isinstance(module, Boosted):
        S, P = module.boost, module.projection
        inner = boost_of(f"{name}.linear", module.linear)  # of a layer that was boosted twice
    elif isinstance(module, PSTLayer) and (module.merged or _prunes(module)):
        adapter_name = module.merged_adapters[0] if module.merged else module.active_pst_adapter
        S, P = module.boost(adapter_name) or (None, None)
    own = {f"{name}.boost": S, f"{name}.projection": P}
    return {key: tensor.detach() for key, tensor in own.items() if tensor is not None} | inner


def layer_type(name: str) -> str:
    """The name of a module inside its block: `encoder.layer.3.output.dense` is of type `output.dense`."""
    return re.sub(r"^.*\.\d+\.", "", name)


def _row(name: str, module: nn.Module) -> TensorSparsity:
    if _prunes(module):
        return TensorSparsity(name, module.shape.numel(), module.num_pruned)
    weight = effective_weight(module)
    return TensorSparsity(name, weight.numel(), weight.numel() - int(torch.count_nonzero(weight)))


def _prunes(module: nn.Module) -> bool:
    """Whether a layer has an adapter that acts now and is not merged."""
    active = isinstance(module, PSTLayer) and module.active_pst_adapter is not None
    return active and not module.merged and not module.disable_adapters


def remaining_parameters(model: nn.Module, names: Iterable[str]) -> list[Tensor]:
    """The parameters of a model beside the weights of these modules, with what an adapter makes of norms and without
    new heads; tied ones once."""
    counted = {id(p) for name in names for p in _weights(model.get_submodule(name))}
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, Norm)]
    changed = {f"{name}.base_layer.{own}": value for name, norm in norms for own, value in norm.effective().items()}
    return [
        changed.get(name, parameter)
        for name, parameter in model.named_parameters()
        if id(parameter) not in counted and ".pst_" not in name and ".modules_to_save." not in name
    ]


def _weights(module: nn.Module) -> list[Tensor]:
    if isinstance(module, Boosted):
        return _weights(module.linear)
    base = module.get_base_layer() if isinstance(module, PSTLayer) else module
    return [] if isinstance(base, SparseLinear) else [base.weight]
