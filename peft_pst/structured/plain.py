"""Widths that an architecture's own config can say."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..coupling import HEAD_SIZES, SHARES, first_block
from .widths import Structure, find_structures, set_widths

# Where configs have the number of neurons, and that of heads.
KEYS = {
    "neuron": (
        "intermediate_size",
        "n_inner",
        "d_ff",
        "ffn_dim",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "hidden_dim",
        "ffn_hidden_size",
    ),
    "head": ("num_attention_heads", "num_key_value_heads", "num_heads", "num_kv_heads", "n_head", "n_heads"),
}


def are_uniform(structures: Mapping[str, Structure], keep: Mapping[str, Tensor]) -> bool:
    """Whether each structure of one pattern keeps as many units, and T5's blocks, which share a position bias, the
    same heads.

    Args:
        structures: all of the pattern.
        keep: of each of them which units stay, bool [units].
    """
    for name, structure in structures.items():
        first = first_block(name)
        shares = not getattr(structure.owner, SHARES, True) and getattr(structures[first].owner, SHARES)
        if shares and not torch.equal(keep[name], keep[first]):
            return False
    return len({(structure.units, int(keep[name].sum())) for name, structure in structures.items()}) == 1


def plain_changes(
    model: PreTrainedModel, structure: Structure, kept: int, widths: Mapping[str, int], biases: list[str]
) -> dict[str, int] | None:
    """What to change in the config of a model that was resized, so that a model made from it is of these sizes.

    Args:
        model: already resized.
        structure: any of the pattern, as it was before.
        kept: how many units each has now.
        widths: of structures of the other pattern that no config can say.
        biases: layers of the model that had no bias.

    Returns:
        Keys and values; None if the config cannot say it.
    """
    old = {key: getattr(model.config, key) for key in KEYS[structure.pattern] if hasattr(model.config, key)}
    if structure.pattern == "neuron":
        # the None of GPT-2 stands for four times the hidden size
        candidates = [{key: kept for key, value in old.items() if value in (structure.units, None)}]
    else:
        heads = {key: v // structure.units * kept for key, v in old.items() if v and v % structure.units == 0}
        size = next(getattr(structure.owner, name) for name in HEAD_SIZES if hasattr(structure.owner, name))
        derived = isinstance(getattr(type(model.config), "head_dim", None), property)
        candidates = [heads] if derived else [heads, heads | {"head_dim": size}]
    return next((changes for changes in candidates if _makes(changes, model, widths, biases)), None)


def pruned_heads(model: PreTrainedModel) -> dict[int, list[int]] | None:
    """The entry of the config by which transformers 4, but not 5, makes BERT, GPT-2 and their like with fewer heads:
    of each layer which heads it has no more. None if that does not give the sizes of the model, already resized."""
    heads = getattr(model.config, "num_attention_heads", 0)
    found = {
        int(re.search(r"\.(\d+)\.", name)[1]): list(range(structure.units, heads))
        for name, structure in find_structures(model, ["head"]).items()
        if structure.units < heads
    }
    return found if found and _makes({"pruned_heads": found}, model, {}, []) else None


def _makes(changes: dict[str, Any], model: PreTrainedModel, widths: Mapping[str, int], biases: list[str]) -> bool:
    """Whether a new model has tensors of the model's sizes, and attention that counts alike."""
    text = json.loads(model.config.to_json_string()) | changes
    text.pop("quantization_config", None)
    try:
        # transformers picks pruned heads by tensors, which on the meta device have no values
        with init_empty_weights() if text.get("pruned_heads") else torch.device("meta"):
            fresh = type(model)(type(model.config).from_dict(text))
    except Exception:  # the class has rules for its config, and errors of many kinds
        return False
    set_widths(fresh, widths, biases)
    return _sizes(model).items() <= _sizes(fresh).items()


def _sizes(model: nn.Module) -> dict[str, Any]:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    counts = {
        (name, key): value
        for name, structure in find_structures(model).items()
        for key, value in vars(structure.owner).items()
        if type(value) in (int, float) and structure.pattern == "head"
    }
    return {name: tensor.shape for name, tensor in tensors} | counts


def set_in_configs(model: PreTrainedModel, changes: Mapping[str, int]) -> None:
    """Change the config of a model and those of its parts, such as the encoder's, in place."""
    kind = type(model.config)
    parts = [getattr(module, "config", None) for module in model.modules()]
    for config in {id(config): config for config in [model.config, *parts] if isinstance(config, kind)}.values():
        for key, value in changes.items():
            setattr(config, key, value)
