"""A transformers model cut into stages by hand: each is a copy of the model that shares its modules and keeps only its
own layers, under their names in the whole model."""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_pst.labels import IGNORED, predicts_next, without_adapter


class Parts(NamedTuple):
    """Where the parts of an architecture lie in its base model, the one without a head."""

    layers: str
    embeddings: str
    """What makes the first hidden state of the tokens."""
    added: str | None
    """What is added to it."""
    between: tuple[str, ...]
    """What else lies between the embeddings and the layers."""
    after: str
    """What comes after the layers."""


LLAMA = Parts("layers", "embed_tokens", None, (), "norm")
GPT2 = Parts("h", "wte", "wpe", ("drop",), "ln_f")
BERT = Parts("encoder.layer", "embeddings", None, (), "pooler")

# Only what was tried: an architecture may do more around its layers than the modules there show, as Gemma, which
# scales what the embeddings return.
ARCHITECTURES: dict[str, Parts] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "glm", "glm4", "smollm3", "olmo2", "phi3"), LLAMA),
    "gpt2": GPT2,
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert"), BERT),
}


class Received(nn.Module):
    """Stands where the embeddings were, and returns the hidden state that came from the stage before."""

    hidden: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.hidden


class Nothing(nn.Module):
    """Stands where something was added to the embeddings, and returns zero."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(())


class Stage(nn.Module):
    """One stage of a model: from token ids or the hidden state before it to the one after it, or to the loss.

    Its parameters are those of the model, not copies, and have the names that they have there, below `model.`.

    Args:
        model: the whole model, with a head; with or without an adapter.
        index: which stage this is, from 0.
        layers: the indices of its layers.
        autocast: the dtype of its products under `torch.autocast`; None for the model's own.

    Raises:
        ValueError: if the model cannot be cut.
    """

    def __init__(self, model: nn.Module, index: int, layers: range, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        parts, total = find_parts(model), count_layers(model)
        self.index, self.layers, self.autocast = index, layers, autocast
        self.is_first, self.is_last = layers.start == 0, layers.stop == total
        head = without_adapter(model)
        base, prefix = head.base_model, head.base_model_prefix
        own = nn.ModuleList()
        for i in layers:
            own.add_module(str(i), base.get_submodule(parts.layers)[i])
        changes: dict[str, nn.Module | None] = {parts.layers: own}
        if not self.is_first:
            changes |= {parts.embeddings: Received()} | {name: nn.Identity() for name in parts.between}
            changes |= {} if parts.added is None else {parts.added: Nothing()}
        if not self.is_last:
            changes[parts.after] = nn.Identity()
        changes = {f"{prefix}.{name}": module for name, module in changes.items()}
        if not self.is_last:
            changes |= {name: None for name, _ in head.named_children() if name != prefix}
        path = "" if head is model else "base_model.model."
        self.model = with_modules(model, {path + name: module for name, module in changes.items()})
        self._parts, self._dtype = parts, head.get_input_embeddings().weight.dtype
        own_base = without_adapter(self.model).base_model
        if getattr(own_base.config, "layer_types", None) is not None:
            # transformers 5 looks them up by the number of the layer in the list
            own_base.config = copy.copy(own_base.config)
            own_base.config.layer_types = [own_base.config.layer_types[i] for i in layers]
        self.shares: Iterator[float] = iter(())
        """Of the last stage: which part of the step's labels each of the coming micro-batches has."""

    def forward(self, received: Tensor, **inputs: Tensor) -> Tensor:
        """One micro-batch.

        Args:
            received: the hidden state [rows, tokens, width] from the stage before; the first stage looks past it.
            **inputs: the micro-batch, as the model's forward takes it. `labels` are for the last stage.

        Returns:
            The hidden state; of the last stage the part of the step's loss that the micro-batch has, a scalar.
        """
        model = without_adapter(self.model)
        labels = inputs.pop("labels", None)
        if not self.is_first:
            inputs.pop("token_type_ids", None)  # they are part of the first hidden state
            model.base_model.get_submodule(self._parts.embeddings).hidden = received
        with torch.autocast(received.device.type, self.autocast, enabled=self.autocast is not None):
            if not self.is_last:
                return call(model.base_model, **inputs)[0].to(self._dtype)
            share = next(self.shares)
            if share == 0:  # the mean over no labels is not a number
                return call(model, **inputs).logits.sum() * 0
            return call(model, labels=labels, **inputs).loss * share

    def hidden_state(self, rows: int, tokens: int) -> Tensor:
        """What goes from stage to stage, without data."""
        width = without_adapter(self.model).config.hidden_size
        return torch.empty(rows, tokens, width, dtype=self._dtype, device="meta", requires_grad=True)


def call(model: PreTrainedModel, **inputs: Tensor) -> Any:
    """The output of a model that keeps no keys and values for a next token."""
    if "use_cache" in inspect.signature(without_adapter(model).forward).parameters:
        inputs["use_cache"] = False
    return model(**inputs, return_dict=True)


def find_parts(model: nn.Module) -> Parts:
    """Where the parts of a model lie that a cut must know.

    Raises:
        ValueError: if the model is of no architecture that can be cut, or has no head.
    """
    head = without_adapter(model)
    kind = getattr(getattr(head, "config", None), "model_type", type(head).__name__)
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"A {type(head).__name__} (model_type {kind!r}) cannot be cut into stages: expected one of "
            f"{', '.join(ARCHITECTURES)}. Another one needs an entry in ARCHITECTURES of "
            "peft_pst.integrations.pipeline.stages, and a test."
        )
    if head.base_model is head:
        raise ValueError(
            f"{type(head).__name__} has no head and so no loss: take a model with one, such as "
            f"{type(head).__name__.removesuffix('Model')}ForSequenceClassification."
        )
    return ARCHITECTURES[kind]


def count_layers(model: nn.Module) -> int:
    """The number of layers of a model that can be cut."""
    return len(without_adapter(model).base_model.get_submodule(find_parts(model).layers))


def layer_ranges(layers: Sequence[int], total: int) -> list[range]:
    """The indices of the layers of each stage.

    Args:
        layers: how many layers each stage has.
        total: how many layers the model has.

    Raises:
        ValueError: if the stages do not add up to the model, or one is empty.
    """
    if sum(layers) != total or min(layers, default=0) < 1:
        raise ValueError(
            f"layers={list(layers)}: expected the number of layers of each stage, at least 1, together the {total} "
            "layers that the model has."
        )
    starts = [sum(layers[:i]) for i in range(len(layers))]
    return [range(start, start + count) for start, count in zip(starts, layers, strict=True)]


def count_labels(model: nn.Module, labels: Tensor) -> int:
    """How many labels the loss of a model is the mean of."""
    return int(((labels[:, 1:] if predicts_next(model) else labels) != IGNORED).sum())


def with_modules(module: nn.Module, changes: Mapping[str, nn.Module | None]) -> nn.Module:
    """A copy of a module with other modules at some places; all that is not on the way to them is shared.

    Args:
        changes: the new modules by their names below `module`; None where there is to be none.
    """
    new = copy.copy(module)
    new._modules = dict(module._modules)
    below: dict[str, dict[str, nn.Module | None]] = defaultdict(dict)
    for path, changed in changes.items():
        name, _, rest = path.partition(".")
        if rest:
            below[name][rest] = changed
        else:
            new._modules[name] = changed
    for name, inner in below.items():
        new._modules[name] = with_modules(module._modules[name], inner)
    return new
