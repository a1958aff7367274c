"""Which units of a structure do nothing but add a constant, and what they add."""

from __future__ import annotations

import torch
from torch import Tensor

from .widths import Linear, Structure, weight_of

ACTIVATIONS = ("act", "act_fn", "activation", "activation_fn", "intermediate_act_fn", "gelu_impl")


def living_units(structure: Structure) -> tuple[Tensor, Tensor]:
    """The units that must stay, and what the others add to the output.

    A unit may go if each of its channels reaches nothing, or is the same whatever the input: of a neuron without
    weights what the activation makes of its bias; of a head without weights for its values the bias of the values,
    since the attention's weights sum to 1 (but for padding that attends to nothing, whose outputs nobody reads). A
    structure keeps one unit at least.

    Returns:
        bool [units], on the CPU, and float64 [out]: what the last layer made of the units that go.
    """
    taken = weight_of(structure.taker).detach()
    constant = _neurons(structure) if structure.pattern == "neuron" else _heads(structure)
    reaches_nothing = (taken == 0).all(0)
    keep = ~(reaches_nothing | ~constant.isnan()).reshape(structure.units, -1).all(1)
    if not keep.any():
        keep[0] = True
    folded = ~keep.repeat_interleave(len(constant) // structure.units) & ~reaches_nothing
    return keep.cpu(), taken[:, folded].double() @ constant[folded]


def _neurons(structure: Structure) -> Tensor:
    """The value of each neuron that is always the same, float64 [inputs]; NaN for the others."""
    dtype = structure.taker.weight.dtype
    first, *gated = [rows for maker, part in structure.makers for rows in _rows(maker).chunk(part.stacks)]
    activation = next((a for name in ACTIVATIONS if callable(a := getattr(structure.owner, name, None))), None)
    if activation is None:
        return torch.full_like(first, torch.nan)
    with torch.no_grad():
        value = activation(first.to(dtype)).double()  # of NaN it is NaN
    value = value.where(~first.isnan(), torch.nan)
    for factor in gated:
        product = value * factor
        value = product.where((value != 0) & (factor != 0), 0.0)  # whatever the other factor is
    return value


def _heads(structure: Structure) -> Tensor:
    """The value of each channel of the heads that is always the same, float64 [inputs]; NaN for the others."""
    maker, part = structure.makers[-1]
    rows = _rows(maker).reshape(part.stacks, structure.units, -1)[-1]  # [units, channels of a unit]
    size = structure.inputs // structure.units
    if len(structure.makers) == 1 and part.stacks == 1:  # a unit's queries, then its key and its value
        rows = rows[:, -((rows.shape[1] - size) // 2) :]
    if size % rows.shape[1]:
        return torch.full((structure.inputs,), torch.nan, dtype=torch.float64, device=rows.device)
    return rows.repeat(1, size // rows.shape[1]).flatten()  # the heads of a group have the same value


def _rows(linear: Linear) -> Tensor:
    """The output of each row that has no weights, which is its bias, float64 [out]; NaN for the others."""
    weight = weight_of(linear).detach()
    bias = torch.zeros(len(weight), device=weight.device) if linear.bias is None else linear.bias.detach()
    return bias.double().masked_fill((weight != 0).any(1), torch.nan)
