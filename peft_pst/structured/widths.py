"""Neurons and heads as a model has them, and the same model with fewer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..coupling import SHARES, find_couplings, first_block
from ..patterns import COUPLED, Slices

Linear = nn.Linear | Conv1D
# What an attention or feed-forward module remembers of its widths: how many units it has, and how many channels.
COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_key_value_heads", "num_kv_heads", "kv_heads")
SIZES = {
    "neuron": ("intermediate_size", "ffn_dim"),
    "head": ("all_head_size", "inner_dim", "split_size", "embed_dim", "hidden_size", "dim"),
}


class Structure(NamedTuple):
    """Linear layers that share their units: all but the last make them, the last takes them."""

    pattern: str
    """`"neuron"` or `"head"`; of heads that share a key and a value, the group is the unit."""
    owner: nn.Module
    """The module that holds the first layer."""
    makers: list[tuple[Linear, Slices]]
    taker: Linear
    taker_name: str
    units: int

    @property
    def inputs(self) -> int:
        """How many channels the last layer takes."""
        return weight_of(self.taker).shape[1]


def weight_of(linear: Linear) -> Tensor:
    """The weight as [out, in]."""
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight


def find_structures(model: nn.Module, patterns: Iterable[str] = COUPLED) -> dict[str, Structure]:
    """The structures of a model without adapters, by the name of their first layer."""
    structures = {}
    for pattern in patterns:
        makers: dict[str, tuple[Linear, Slices]] = {}
        for name, (_, part) in find_couplings(model, pattern).items():
            linear = model.get_submodule(name)
            if part.dim == 0:
                makers[name] = linear, part
                continue
            first = next(iter(makers))
            owner = model.get_submodule(first.rpartition(".")[0])
            structures[first] = Structure(pattern, owner, list(makers.values()), linear, name, part.units)
            makers = {}
    return structures


def resize(
    model: nn.Module, keep: Mapping[str, Tensor], biases: Iterable[str] = (), share_position_bias: bool = False
) -> None:
    """Give structures fewer units, in place. The parameters that change are new ones, on the device of the old.

    Args:
        model: on any device, the meta device too.
        keep: of each structure that loses units, by the name of its first layer, which stay: bool [units], on the CPU.
        biases: names of linear layers that get a bias, of zeros.
        share_position_bias: whether T5's first block goes on computing the position bias for all: its heads must lose
            the same units then. Else each attention has one of its own, cut to its heads.
    """
    structures = find_structures(model)
    alone = [name for name in structures if hasattr(structures[name].owner, SHARES)]
    if not share_position_bias and not keep.keys().isdisjoint(alone):
        for name in alone:
            _give_own_position_bias(structures[name].owner, model.get_submodule(first_block(name).rpartition(".")[0]))
    for name, mask in keep.items():
        _resize(structures[name], mask)
    for name in biases:
        taker = model.get_submodule(name)
        taker.bias = nn.Parameter(taker.weight.new_zeros(taker.out_features), taker.weight.requires_grad)


def set_widths(model: nn.Module, widths: Mapping[str, int], biases: Iterable[str] = ()) -> None:
    """Give the structures of a new model the widths of a checkpoint, in place: `resize` by numbers of units."""
    structures = find_structures(model)
    units = {name: torch.arange(structures[name].units, device="cpu") for name in widths}
    resize(model, {name: units[name] < kept for name, kept in widths.items()}, biases)


def _resize(structure: Structure, keep: Tensor) -> None:
    pattern, owner, units, inputs = structure.pattern, structure.owner, structure.units, structure.inputs
    for maker, part in structure.makers:
        _select(maker, 0, keep, part.stacks)
    _select(structure.taker, 1, keep)
    kept = int(keep.sum())
    for name, value in vars(owner).items():
        if pattern == "head" and name in COUNTS and value % units == 0:
            vars(owner)[name] = value // units * kept
        elif name == "embed_dim" and hasattr(owner, "split_size"):
            pass  # GPT-2 has it for the residual stream
        elif name in SIZES[pattern] and value == inputs:
            vars(owner)[name] = structure.inputs
    position_bias = getattr(owner, "relative_attention_bias", None)  # [buckets, heads]
    if pattern == "head" and isinstance(position_bias, nn.Embedding):
        position_bias.weight = _lines(position_bias.weight, 1, keep)
        position_bias.embedding_dim = kept


def _select(linear: Linear, dim: int, keep: Tensor, stacks: int = 1) -> None:
    """Leave the units that stay among the outputs (dim 0) or inputs (dim 1) of a linear layer."""
    size = weight_of(linear).shape[dim]
    lines = keep.repeat_interleave(size // (stacks * len(keep))).repeat(stacks)
    linear.weight = _lines(linear.weight, 1 - dim if isinstance(linear, Conv1D) else dim, lines)
    if dim == 0 and linear.bias is not None:
        linear.bias = _lines(linear.bias, 0, lines)
    names = ("nf", "nx") if isinstance(linear, Conv1D) else ("out_features", "in_features")
    setattr(linear, names[dim], int(lines.sum()))


def _lines(parameter: nn.Parameter, dim: int, keep: Tensor) -> nn.Parameter:
    index = keep.nonzero()[:, 0].to(parameter.device)
    return nn.Parameter(parameter.detach().index_select(dim, index), parameter.requires_grad)


def _give_own_position_bias(attention: nn.Module, first: nn.Module) -> None:
    if getattr(first, SHARES) and not getattr(attention, SHARES):
        shared = first.relative_attention_bias
        own = nn.Embedding(*shared.weight.shape, device="meta")
        own.weight = nn.Parameter(shared.weight.detach().clone(), shared.weight.requires_grad)
        attention.relative_attention_bias = own
        setattr(attention, SHARES, True)
    if _drop_position_bias not in attention._forward_pre_hooks.values():
        attention.register_forward_pre_hook(_drop_position_bias, with_kwargs=True)


def _drop_position_bias(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Before its forward: what the first block computed is for other heads, and without it T5 computes its own."""
    return args, {**kwargs, "position_bias": None}
