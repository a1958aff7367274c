"""Rotary positions with fewer frequencies: which of them the config of a narrower model can say."""

from __future__ import annotations

import copy
import sys
from typing import NamedTuple

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


class Choice(NamedTuple):
    """Frequencies that a narrower model can have: `kept` of those of the other one, every m-th from one on."""

    kept: Tensor
    """int64 [frequencies of the narrower model], ascending."""
    theta: float
    factor: float | None
    """By which positions are scaled, which makes all frequencies slower; None to leave their scaling as it is."""

    def set_in(self, config: PretrainedConfig) -> None:
        """Give the config of the narrower model these frequencies, in place."""
        parameters = getattr(config, "rope_parameters", None)
        if parameters is not None:  # transformers 5
            parameters["rope_theta"] = self.theta
            if self.factor is not None:
                parameters |= {"rope_type": "linear", "factor": self.factor}
            return
        config.rope_theta = self.theta
        if self.factor is not None:
            config.rope_scaling = {"rope_type": "linear", "factor": self.factor}
        if hasattr(config, "rotary_emb_base"):  # GPT-NeoX, which makes rope_theta from it
            config.rotary_emb_base = self.theta


def frequency_choices(rotary: nn.Module, config: PretrainedConfig, narrower: PretrainedConfig) -> list[Choice]:
    """Which frequencies a model of fewer channels can have.

    They are theta^(-2i/d), i = 0, 1, ... So those with i = s + m j, j = 0, 1, ..., are the frequencies of d' channels
    with theta^(m d'/d), if the positions are divided by theta^(2s/d).

    Args:
        rotary: the module that makes the positions, of any width.
        config: of the model that has all frequencies.
        narrower: of the model of fewer channels, with the same theta.

    Raises:
        TypeError: if there is none, since a scaling of the positions counts the channels.
    """
    old, new, theta = _frequencies(rotary, config), len(_frequencies(rotary, narrower)), _theta(config)
    choices = []
    for stride in range(1, (len(old) - 1) // max(new - 1, 1) + 1):
        for start in range(len(old) - stride * (new - 1) if _is_unscaled(config) else 1):
            factor = theta ** (start / len(old)) if start else None
            choice = Choice(start + stride * torch.arange(new), theta ** (stride * new / len(old)), factor)
            changed = copy.deepcopy(narrower)
            choice.set_in(changed)
            found = _frequencies(rotary, changed)
            if len(found) and torch.allclose(found, old[choice.kept], 1e-5, 0):
                choices.append(choice)
    if not choices:
        raise TypeError(
            f"compress cannot narrow this {config.model_type} model: its rotary positions are scaled in a way that "
            "depends on the width of its heads. Its depth can be compressed alone: leave out head_dim and width_ratio."
        )
    return choices


def _theta(config: PretrainedConfig) -> float:
    parameters = getattr(config, "rope_parameters", None)
    return config.rope_theta if parameters is None else parameters["rope_theta"]


def _is_unscaled(config: PretrainedConfig) -> bool:
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return scaling.get("rope_type", "default") == "default"


def _frequencies(rotary: nn.Module, config: PretrainedConfig) -> Tensor:
    """As new ones, since those of a model in bf16 are rounded; none if a list for each of them has another length."""
    try:
        return type(rotary)(config=config).inv_freq
    except RuntimeError:  # longrope
        return torch.empty(0)
