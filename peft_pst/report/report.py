"""report: what the sparsity of a model is, layer by layer, and what it costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..sparse.linear import SparseLinear
from ..sparse.storage import sizes
from .behaviour import Fidelity, Robustness, fidelity, robustness
from .energy import Energy, measured
from .sparsity import boost_of, effective_weight, remaining_parameters, weight_names
from .tables import format_table

FORMATS = ("bitmask", "tiles", "2:4", "int8")


@dataclasses.dataclass(frozen=True)
class Cost:
    """What some weights cost.

    `flops` are multiplications and additions a token, two for each non-zero in the linear layers; `dense_flops` as if
    nothing were zero. `dense_bytes` are those of the values as they are; `bytes` those of a sparse checkpoint.
    """

    parameters: int
    nonzeros: int
    dense_flops: int
    flops: int
    dense_bytes: int
    bytes: int

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return 1 - self.nonzeros / self.parameters

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """The weight of one layer, [out, in], or of its low-rank boost, whose rows follow.

    `dead_rows` are outputs that do not depend on the input, `dead_columns` inputs that nothing reads. `formats` has
    the bytes in each format, None where the weight does not fit.
    """

    name: str
    shape: tuple[int, int]
    cost: Cost
    dead_rows: int
    dead_columns: int
    formats: dict[str, int | None]


@dataclasses.dataclass(frozen=True)
class Report:
    """What `report` found; `table()` to read, `to_dict()` for JSON."""

    layers: list[LayerReport]
    total: Cost
    """All these layers."""
    model: Cost
    """The whole model, embeddings and biases included, without an adapter's own parameters."""
    fidelity: Fidelity | None
    robustness: Robustness | None
    energy: Energy | None

    def to_dict(self) -> dict[str, Any]:
        """All of it in what JSON knows."""
        return dataclasses.asdict(self)

    def table(self) -> str:
        """A row for each layer and two for all; behaviour, where it was measured, below."""
        header = ("layer", "shape", "non-zeros", "sparsity", "dead rows", "dead columns", "kFLOP a token, of dense")
        rows = [
            (
                layer.name,
                "x".join(map(str, layer.shape)),
                *_cost_cells(layer.cost, layer.dead_rows, layer.dead_columns),
                *(_kilobytes(layer.formats[name]) for name in FORMATS),
            )
            for layer in self.layers
        ]
        for name, cost in (("these layers", self.total), ("whole model", self.model)):
            rows.append((name, "", *_cost_cells(cost, "", ""), *("" for _ in FORMATS)))
        text = format_table((*header, "kB dense", "stored", *FORMATS), rows)
        for behaviour in (self.fidelity, self.robustness, self.energy):
            if behaviour is not None:
                text += "\n\n" + behaviour.table()
        return text


def report(
    model: nn.Module,
    *,
    texts: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dense: nn.Module | None = None,
    country: str = "USA",
) -> Report:
    """What a model's sparsity is and costs, and given texts, what it does.

    Args:
        model: a model with a PST adapter or merged, one opened from a sparse checkpoint, or any other. It is put into
            evaluation mode.
        texts: what the model reads, for all that follows.
        labels: the class of each text, for the robustness of a classifier.
        tokenizer: turns the texts into tokens.
        dense: the dense model, for fidelity.
        country: where the electricity comes from, an ISO code of three letters, for the CO2. Energy is measured where
            codecarbon is installed.

    Raises:
        ValueError: if the model has no linear layer, the list of texts is empty, labels or a dense model are given
            without texts and a tokenizer, or the labels are not as many as the texts or not those of a classifier.
    """
    if (texts is None or tokenizer is None) and (labels is not None or dense is not None):
        raise ValueError("labels and dense need texts=[...] and tokenizer=... too: they say how the model is asked.")
    if labels is not None and len(labels) != len(texts):
        raise ValueError(f"There are {len(labels)} labels, but {len(texts)} texts: expected one for each.")
    if texts is not None and not len(texts):
        raise ValueError("texts is empty: expected at least one text, or None.")
    names = weight_names(model)
    if not names:
        raise ValueError(f"{type(model).__name__} has no linear layer: there is no weight to report on.")
    layers, counted = [], set()
    for name in tqdm(names, desc="report", disable=len(names) < 100):
        module = model.get_submodule(name)
        boost = boost_of(name, module)
        layers += [_layer(name, module), *(_boost(*item) for item in boost.items())]
        counted |= {tensor.data_ptr() for tensor in boost.values()}
    total = sum((layer.cost for layer in layers), Cost(0, 0, 0, 0, 0, 0))
    remaining = [p for p in remaining_parameters(model, names) if p.data_ptr() not in counted]
    rest = sum((_rest(parameter) for parameter in remaining), Cost(0, 0, 0, 0, 0, 0))
    return Report(
        layers,
        total,
        total + rest,
        None if dense is None else fidelity(model, dense, tokenizer, texts),
        None if labels is None else robustness(model, tokenizer, texts, labels),
        None if texts is None or tokenizer is None else measured(model, tokenizer, texts, country),
    )


@torch.no_grad()
def _layer(name: str, module: nn.Module) -> LayerReport:
    weight = effective_weight(module)
    formats = sizes(weight)
    if isinstance(module, SparseLinear) and "scales" in module.parts:
        stored = formats["int8"]
    else:
        stored = min(size for name, size in formats.items() if name != "int8" and size is not None)
    return _report(name, weight, stored, formats)


def _boost(name: str, tensor: Tensor) -> LayerReport:
    """A tensor of a boost, which a sparse checkpoint stores as it is."""
    return _report(name, tensor, tensor.nbytes, {"dense": tensor.nbytes, **dict.fromkeys(FORMATS)})


def _report(name: str, weight: Tensor, stored: int, formats: dict[str, int | None]) -> LayerReport:
    nonzero = weight != 0
    count = int(nonzero.sum())
    cost = Cost(weight.numel(), count, 2 * weight.numel(), 2 * count, weight.nbytes, stored)
    dead = [int((~nonzero.any(dim)).sum()) for dim in (1, 0)]
    return LayerReport(name, tuple(weight.shape), cost, *dead, formats)


def _rest(parameter: Tensor) -> Cost:
    size = parameter.numel() * parameter.element_size()
    return Cost(parameter.numel(), int(torch.count_nonzero(parameter)), 0, 0, size, size)


def _cost_cells(cost: Cost, dead_rows: int | str, dead_columns: int | str) -> tuple[str, ...]:
    return (
        f"{cost.nonzeros:,} of {cost.parameters:,}",
        f"{cost.sparsity:.2%}",
        str(dead_rows),
        str(dead_columns),
        f"{cost.flops / 1e3:,.0f} of {cost.dense_flops / 1e3:,.0f}",
        _kilobytes(cost.dense_bytes),
        _kilobytes(cost.bytes),
    )


def _kilobytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e3:,.0f}"
