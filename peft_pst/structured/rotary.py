"""Rotary positions with fewer frequencies: which of them the config of a narrower model can say."""

from __future__ import annotations

import copy
import sys

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig


def rotary_of(model: nn.Module) -> nn.Module | None:
    """The module that makes the rotary positions, from its `inv_freq`; None if positions are none of that kind.

    Raises:
        TypeError: if there are several, of different frequencies.
    """
    modules = [module for module in model.modules() if isinstance(getattr(module, "inv_freq", None), Tensor)]
    if any(not torch.equal(module.inv_freq, modules[0].inv_freq) for module in modules):
        raise TypeError(
            f"{type(model).__name__} has rotary positions of several kinds, which compress does not know. Its depth "
            "can be compressed alone: leave out head_dim and width_ratio."
        )
    return modules[0] if modules else None


def turned_pairs(attention: nn.Module, frequencies: int) -> Tensor:
    """Which two channels of a head each frequency turns, int64 [frequencies, 2]: one of each half in Llama, neighbours
    in GLM. The model's own `rotate_half` says it.

    Raises:
        TypeError: if the model's code has no such function.
    """
    rotate = getattr(sys.modules[type(attention).__module__], "rotate_half", None)
    if rotate is None:
        raise TypeError(
            f"compress does not know which channels the rotary positions of {type(attention).__name__} turn together. "
            "Its depth can be compressed alone: leave out head_dim and width_ratio."
        )
    places = torch.arange(2 * frequencies)
    partner = rotate(places + 1).abs() - 1
    first = places[partner > places]
    return torch.stack([first, partner[first]], 1)


def possible_thetas(rotary: nn.Module, config: PretrainedConfig, narrower: PretrainedConfig) -> dict[int, float]:
    """Which frequencies a model of fewer channels can have.

    They are theta^(-2i/d), i = 0, 1, ...; so every m-th of them are those of d' channels with theta^(m d'/d).

    Args:
        rotary: the module that makes the positions, of any width.
        config: of the model that has all frequencies.
        narrower: of the model of fewer channels, with the same theta.

    Returns:
        Of each stride m that is possible the theta.

    Raises:
        TypeError: if there is none, since a scaling of the positions counts the channels.
    """
    (old, new), theta, thetas = (len(_frequencies(rotary, each)) for each in (config, narrower)), _theta(config), {}
    for stride in range(1, (old - 1) // max(new - 1, 1) + 1):
        changed = copy.deepcopy(narrower)
        set_theta(changed, theta ** (stride * new / old))
        found, expected = _frequencies(rotary, changed), _frequencies(rotary, config)[::stride][:new]
        if len(found) and torch.allclose(found, expected, 1e-5, 0):
            thetas[stride] = _theta(changed)
    if not thetas:
        raise TypeError(
            f"compress cannot narrow this {config.model_type} model: its rotary positions are scaled in a way that "
            "depends on the width of its heads. Its depth can be compressed alone: leave out head_dim and width_ratio."
        )
    return thetas


def set_theta(config: PretrainedConfig, theta: float) -> None:
    """Set the base of the rotary frequencies, in place."""
    parameters = getattr(config, "rope_parameters", None)
    if parameters is not None:  # transformers 5
        parameters["rope_theta"] = theta
        return
    config.rope_theta = theta
    if hasattr(config, "rotary_emb_base"):  # GPT-NeoX, which makes rope_theta from it
        config.rotary_emb_base = theta


def _theta(config: PretrainedConfig) -> float:
    parameters = getattr(config, "rope_parameters", None)
    return config.rope_theta if parameters is None else parameters["rope_theta"]


def _frequencies(rotary: nn.Module, config: PretrainedConfig) -> Tensor:
    """As new ones, since those of a model in bf16 are rounded; none if a list for each of them has another length."""
    try:
        return type(rotary)(config=config).inv_freq
    except RuntimeError:  # longrope
        return torch.empty(0)
