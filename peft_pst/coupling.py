"""Structures that lie in several weights, an FFN neuron or an attention head, and are pruned in all of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from peft.tuners.tuners_utils import _get_in_out_features
from torch import nn
from transformers.pytorch_utils import Conv1D

from .patterns import Slices

# Names below one module. The last one takes the units as its inputs, the others make them as their outputs.
STRUCTURES = {
    "neuron": (
        ("gate_proj", "up_proj", "down_proj"),
        ("up_proj", "down_proj"),
        ("gate_up_proj", "down_proj"),  # GLM and Phi-3: the gates stacked on the rest
        ("intermediate.dense", "output.dense"),
        ("c_fc", "c_proj"),
        ("fc1", "fc2"),
        ("fc_in", "fc_out"),
        ("dense_h_to_4h", "dense_4h_to_h"),
        ("wi_0", "wi_1", "wo"),
        ("wi", "wo"),
        ("w1", "w3", "w2"),
        ("lin1", "lin2"),
        ("feed_forward.key", "feed_forward.value"),
    ),
    "head": (
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        ("q_proj", "k_proj", "v_proj", "out_proj"),
        ("q_proj", "k_proj", "v_proj", "dense"),
        ("self.query", "self.key", "self.value", "output.dense"),
        ("self.query_proj", "self.key_proj", "self.value_proj", "output.dense"),
        ("q", "k", "v", "o"),
        ("q_lin", "k_lin", "v_lin", "out_lin"),
        ("c_attn", "c_proj"),
        ("Wqkv", "out_proj"),
        ("query_key_value", "dense"),
        ("self.in_proj", "output.dense"),
    ),
}
# One projection for queries, keys and values: three stacked ones, or the three of each head side by side.
STACKS = {
    "GPT2Attention": 3,
    "MptAttention": 3,
    "BloomAttention": 1,
    "FalconAttention": 1,
    "GPTBigCodeAttention": 1,
    "GPTNeoXAttention": 1,
    "DisentangledSelfAttention": 1,
}
HEAD_SIZES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
SHARES = "has_relative_attention_bias"
"""The attribute of T5's attention: False where it takes the position bias that the first block computed."""


class Coupling(NamedTuple):
    """The part that one weight has in a coupled structure."""

    group: str
    """Names the structure: its weights share it, and nothing else does."""
    part: Slices


def find_couplings(model: nn.Module, pattern: str, own: Sequence[Sequence[str]] | None = None) -> dict[str, Coupling]:
    """The linear layers of a model that hold neurons or heads.

    Args:
        model: a model, with or without adapters around its layers.
        pattern: `"neuron"` or `"head"`.
        own: structures that the user names; by default those of the architectures that are known.

    Returns:
        The coupling of each of these layers by its name; the layers of one block stand together, the last one last.
        The blocks of T5 that share a position bias, which has a column for each head, share their heads.

    Raises:
        ValueError: if a structure that the user names is not in the model.
    """
    modules = {name.removesuffix(".base_layer"): module for name, module in model.named_modules()}
    couplings: dict[str, Coupling] = {}
    for structure in own or STRUCTURES[pattern]:
        last, before = structure[-1], len(couplings)
        for name in [name for name in modules if name == last or name.endswith(f".{last}")]:
            prefix = name.removesuffix(last)
            members = {prefix + member: modules.get(prefix + member) for member in structure}
            if any(name in couplings or not isinstance(m, (nn.Linear, Conv1D)) for name, m in members.items()):
                continue
            owner = f"{prefix}{structure[0]}".rpartition(".")[0]
            parts = _parts(list(members.values()), pattern, modules[owner])
            if parts is not None:
                shared = pattern == "head" and shares_position_bias(modules, owner)
                group = f"{first_block(prefix) if shared else prefix}({', '.join(structure)})"
                couplings |= {name: Coupling(group, part) for name, part in zip(members, parts, strict=True)}
        if own and len(couplings) == before:
            raise ValueError(
                f"coupled_modules names {list(structure)}, but the model has no linear layers of these names, one "
                f"beside the other, that share a {pattern}: each but the last makes the units as its outputs, the "
                "last takes them as its inputs."
            )
    return couplings


def shares_position_bias(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Whether an attention of T5 has its position bias in common with those of other blocks.

    Args:
        modules: those of the model by their names.
        name: the attention's.
    """
    first = modules.get(first_block(name))
    if not getattr(first, SHARES, False):
        return False
    blocks = (module for other, module in modules.items() if first_block(other) == first_block(name))
    return any(not getattr(block, SHARES) for block in blocks)


def first_block(name: str) -> str:
    """The name that a module of a block has in the first block."""
    return re.sub(r"\.\d+\.", ".0.", name, count=1)


def _parts(linears: list[nn.Module], pattern: str, owner: nn.Module) -> list[Slices] | None:
    """The slices of each linear layer of one structure; None if their shapes are not those of such a structure.

    The owner is the module that holds the first of them.
    """
    *makers, taker = [_get_in_out_features(linear) for linear in linears]
    outputs = [out_features for _, out_features in makers]
    inputs = taker[0]
    if pattern == "neuron":
        stacks = 2 if hasattr(owner, "gate_up_proj") else 1
        fits = all(size == stacks * inputs for size in outputs)
        return [*[Slices(0, inputs, stacks)] * len(outputs), Slices(1, inputs)] if fits else None
    head_size = next((getattr(owner, name) for name in HEAD_SIZES if hasattr(owner, name)), None)
    if head_size is None:
        return None
    stacks = 1
    if len(makers) == 1:
        if type(owner).__name__ not in STACKS:
            return None
        stacks = STACKS[type(owner).__name__]
        # several query heads may share a key and a value
        units = getattr(owner, "num_kv_heads", getattr(owner, "kv_heads", inputs // head_size))
    else:
        units = min(outputs) // head_size
    fits = units > 1 and all(size % (stacks * units) == 0 for size in outputs) and inputs % units == 0
    fits = fits and (stacks == 1 or outputs == [stacks * inputs])
    return [*[Slices(0, units, stacks)] * len(outputs), Slices(1, units)] if fits else None
