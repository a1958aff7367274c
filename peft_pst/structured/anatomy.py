"""Where the channels of a transformer lie: those of the residual stream, of each attention head, of each neuron."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..coupling import HEAD_SIZES
from .widths import Structure, find_structures

SCALES = ("scaling", "inv_norm_factor")
"""Attributes in which attentions keep what they multiply the scores by."""


class Attention(NamedTuple):
    """The linear layers of one attention, and how their channels lie."""

    structure: Structure
    head_dim: int
    layouts: list[list[str]]
    """Of each layer that makes queries, keys or values: of each of its stacks the roles of the heads of one unit, one
    letter each. Separate layers of grouped queries are "qq", "k" and "v"; GPT-2's one layer is "q", "k", "v" in three
    stacks; GPT-NeoX's is "qkv" for each head."""

    @property
    def units(self) -> int:
        """How many heads there are that have a key and a value of their own."""
        return self.structure.units

    @property
    def group(self) -> int:
        """How many query heads share a key and a value."""
        return self.structure.inputs // (self.units * self.head_dim)

    @property
    def norms(self) -> list[tuple[str, nn.Module]]:
        """The norms over the channels of a query or key, by their names in the attention."""
        children = self.structure.owner.named_children()
        weights = ((name, module, getattr(module, "weight", None)) for name, module in children)
        return [(name, m) for name, m, w in weights if isinstance(w, Tensor) and w.shape == (self.head_dim,)]

    def scale(self) -> float:
        """What the attention multiplies the products of queries and keys by."""
        owner = self.structure.owner
        known = [value for name in SCALES if isinstance(value := getattr(owner, name, None), float)]
        if known:
            return known[0]
        scale = self.head_dim**-0.5
        if hasattr(owner, "scale_attn_weights") and owner.config._attn_implementation == "eager":
            # GPT-2 in transformers 4; its other implementations know neither
            scale = scale if owner.scale_attn_weights else 1.0
            scale = scale / (owner.layer_idx + 1) if owner.scale_attn_by_inverse_layer_idx else scale
        return scale


class Anatomy(NamedTuple):
    """The parts of a transformer whose widths can change. Names are those of modules."""

    layers: str
    """The list of layers."""
    attentions: dict[str, Attention]
    """By the name of the first linear layer of each."""
    neurons: dict[str, Structure]
    names: dict[nn.Module, str]

    def layer_of(self, name: str) -> int | None:
        """The layer that a module or parameter lies in; None for one outside of the layers."""
        if not name.startswith(f"{self.layers}."):
            return None
        return int(name[len(self.layers) + 1 :].partition(".")[0])

    def check(self, model: PreTrainedModel) -> None:
        """Raise TypeError if a layer has no attention or feed-forward block of a kind that is known."""
        for kind, found in (("attention", self.attentions), ("feed-forward block", self.neurons)):
            missing = set(range(model.config.num_hidden_layers)) - {self.layer_of(name) for name in found}
            if missing:
                raise TypeError(
                    f"compress does not know the {kind} of layer {min(missing)} of {type(model).__name__}: expected "
                    "one of those that pattern='head' and pattern='neuron' know. Its depth can be compressed alone: "
                    "leave out head_dim and width_ratio."
                )


def find_anatomy(model: PreTrainedModel) -> Anatomy:
    """Find the layers of a model, its attentions and its feed-forward blocks, as far as they are known.

    Raises:
        TypeError: if it has no single stack of layers.
    """
    count = getattr(model.config, "num_hidden_layers", None)
    lists = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    lists = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(lists) != 1 or model.config.is_encoder_decoder:
        raise TypeError(
            f"compress does not know the layers of {type(model).__name__}: expected one stack of transformer layers, "
            "as in Llama, GLM, GPT-2 or BERT."
        )
    return Anatomy(
        lists[0],
        {name: _attention(structure) for name, structure in find_structures(model, ["head"]).items()},
        find_structures(model, ["neuron"]),
        {module: name for name, module in model.named_modules()},
    )


def _attention(structure: Structure) -> Attention:
    size = next(getattr(structure.owner, key) for key in HEAD_SIZES if hasattr(structure.owner, key))
    group = structure.inputs // (structure.units * size)
    if len(structure.makers) == 3:
        layouts = [["q" * group], ["k"], ["v"]]
    elif structure.makers[0][1].stacks == 3:
        layouts = [["q", "k", "v"]]
    else:
        layouts = [["q" * group + "kv"]]
    return Attention(structure, size, layouts)
