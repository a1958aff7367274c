"""The tensors of a smaller model, cut out of those of a larger one."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .anatomy import Anatomy, Attention
from .selection import Heads, Kept
from .widths import Linear


def cut(
    model: PreTrainedModel, anatomy: Anatomy, smaller: PreTrainedModel, to: Anatomy, kept: Kept
) -> dict[str, Tensor]:
    """The tensors of the smaller model by their names, copies.

    Scales that depend on widths are made up for: norms divide by the mean square of fewer channels, and attentions
    scale their scores by another head_dim. So the outputs are those of the model with the other channels zero, exactly
    where a norm subtracts no mean.

    Args:
        smaller: a model of the new sizes, on the meta device.
        to: its parts.

    Raises:
        TypeError: if a tensor of the smaller model is not in the larger one, or a size changes in a way that is not
            known.
    """
    indices, scales = _indices(anatomy, kept), _scales(anatomy, to, kept)
    tensors, found, taken = model.state_dict(), {}, set()
    hidden, narrower = model.config.hidden_size, smaller.config.hidden_size
    for name, like in smaller.state_dict().items():
        layer = to.layer_of(name)
        old = name
        if layer is not None:
            old = name.replace(f"{to.layers}.{layer}.", f"{anatomy.layers}.{kept.layers[layer]}.", 1)
        if old not in tensors:
            raise TypeError(
                f"compress cannot make this {type(model).__name__}: layers are of several kinds, and {name!r} of the "
                f"smaller one would come from {old!r}, which is not there. Name other layers to stay."
            )
        taken.add(old)
        tensor = tensors[old].detach()
        shape = tuple(tensor.shape)
        for dim, (before, after) in enumerate(zip(shape, like.shape, strict=True)):
            index = indices.get((old, dim))
            if index is None and before != after:
                index = kept.hidden
                if (before, after) != (hidden, narrower):
                    raise TypeError(
                        f"compress does not know the sizes of {type(model).__name__}: those of {old!r} are {shape}, "
                        f"and should become {tuple(like.shape)}. Its depth can be compressed alone: leave out "
                        "head_dim and width_ratio."
                    )
            if index is not None:
                tensor = tensor.index_select(dim, index.to(tensor.device))
        if old in scales:
            tensor = _scaled(tensor, scales[old].to(tensor.device))
        elif kept.hidden is not None and shape == (hidden,) and _is_norm(model, old):
            tensor = _scaled(tensor, torch.tensor(math.sqrt(hidden / narrower), dtype=torch.float64))
        found[name] = tensor.clone()
    left = [name for name in tensors if anatomy.layer_of(name) in kept.layers and name not in taken]
    if left:
        raise TypeError(
            f"compress cannot make this {type(model).__name__}: layers are of several kinds, and the place of the "
            f"layer that has {left[0]!r} in the smaller one is for a layer without it. Name other layers to stay."
        )
    return found


def _scaled(tensor: Tensor, scale: Tensor) -> Tensor:
    return (tensor.double() * scale).to(tensor.dtype)


def _is_norm(model: PreTrainedModel, name: str) -> bool:
    module, _, parameter = name.rpartition(".")
    return parameter == "weight" and "norm" in type(model.get_submodule(module)).__name__.lower()


def _indices(anatomy: Anatomy, kept: Kept) -> dict[tuple[str, int], Tensor]:
    """Which channels of heads and neurons stay, by the name of a parameter and its dimension."""
    indices: dict[tuple[str, int], Tensor] = {}

    def note(linear: Linear, dim: int, index: Tensor) -> None:
        name = anatomy.names[linear]
        indices[f"{name}.weight", 1 - dim if isinstance(linear, Conv1D) else dim] = index
        if dim == 0:
            indices[f"{name}.bias", 0] = index

    for name, index in kept.neurons.items():
        structure = anatomy.neurons[name]
        for maker, part in structure.makers:
            note(maker, 0, torch.cat([stack * structure.units + index for stack in range(part.stacks)]))
        note(structure.taker, 1, index)
    for name, heads in kept.heads.items():
        attention = anatomy.attentions[name]
        for (maker, _), stacks in zip(attention.structure.makers, attention.layouts, strict=True):
            note(maker, 0, _channels(attention, stacks, heads))
        note(attention.structure.taker, 1, _channels(attention, ["v" * attention.group], heads))
        for norm, _ in attention.norms:
            owner = anatomy.names[attention.structure.owner]
            indices[f"{owner}.{norm}.weight", 0] = heads.queries[0]
    return indices


def _channels(attention: Attention, stacks: list[str], heads: Heads) -> Tensor:
    """The channels that stay of a linear layer that has these roles: stack by stack, unit by unit, role by role."""
    parts, start = [], 0
    for roles in stacks:
        for unit in range(attention.units):
            for role in roles:
                parts.append(start + (heads.values if role == "v" else heads.queries)[unit])
                start += attention.head_dim
    return torch.cat(parts)


def _scales(anatomy: Anatomy, to: Anatomy, kept: Kept) -> dict[str, Tensor]:
    """What the tensors of attentions are multiplied by, float64 scalars or [out]."""
    scales: dict[str, Tensor] = {}
    by_layer = {to.layer_of(name): attention for name, attention in to.attentions.items()}
    for name, attention in anatomy.attentions.items():
        if anatomy.layer_of(name) not in kept.layers:
            continue
        new = by_layer[kept.layers.index(anatomy.layer_of(name))]
        factor = attention.scale() / new.scale()
        if attention.norms:
            owner = anatomy.names[attention.structure.owner]
            root = math.sqrt(attention.head_dim / new.head_dim)
            for norm, _ in attention.norms:  # of queries and of keys
                scales[f"{owner}.{norm}.weight"] = torch.tensor(root * math.sqrt(factor), dtype=torch.float64)
        elif factor != 1:
            for (maker, _), stacks in zip(attention.structure.makers, attention.layouts, strict=True):
                rows = [factor if role == "q" else 1.0 for roles in stacks for role in new.units * roles]
                scale = torch.tensor(rows, dtype=torch.float64).repeat_interleave(new.head_dim)
                linear = anatomy.names[maker]
                scales[f"{linear}.weight"] = scale if isinstance(maker, Conv1D) else scale[:, None]
                scales[f"{linear}.bias"] = scale
    return scales
