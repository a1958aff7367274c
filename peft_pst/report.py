"""What a model's sparsity is: a row for each weight, as a table and as a figure."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from .layer import PSTLayer
from .model import is_plain_linear

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class TensorSparsity(NamedTuple):
    """How many of a weight's entries are zero."""

    name: str
    numel: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return self.zeros / self.numel


def tensor_sparsity(model: nn.Module, names: Iterable[str] | None = None) -> list[TensorSparsity]:
    """The sparsity of weights, in the order of the model.

    Args:
        model: a model with PST layers, merged or not, or any other.
        names: the names of the modules whose weights count. By default the PST targets; in a model without PST
            layers all linear layers.

    Returns:
        One row a weight. What an adapter prunes but has not merged counts as zeros.
    """
    modules = dict(model.named_modules())
    if names is None:
        names = [name for name, module in modules.items() if isinstance(module, PSTLayer)]
        names = names or [name for name, module in modules.items() if is_plain_linear(module)]
    return [_row(name, modules[name]) for name in names]


def _row(name: str, module: nn.Module) -> TensorSparsity:
    if isinstance(module, PSTLayer):
        adapter = module.active_pst_adapter
        if adapter is not None and not module.merged and not module.disable_adapters:
            return TensorSparsity(name, module.out_features * module.in_features, module.num_pruned)
    weight = module.weight
    return TensorSparsity(name, weight.numel(), weight.numel() - int(torch.count_nonzero(weight)))


def format_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown, its columns padded so that it reads well on a terminal too."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def plot_sparsity(rows: Sequence[TensorSparsity], path: str | os.PathLike) -> Figure:
    """Draw the sparsity of each weight as a horizontal bar and write the figure to `path` (.png, .svg or .pdf).

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_sparsity needs matplotlib: pip install 'peft-pst[plot]'") from error

    figure = Figure(figsize=(8, 1 + 0.22 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh([row.name for row in rows], [100 * row.sparsity for row in rows])
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set(xlim=(0, 100), xlabel="zeros in the weight (%)", title="Sparsity of each weight")
    axes.tick_params(axis="y", labelsize=7)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=path.suffix, delete=False) as file:
        figure.savefig(file, format=path.suffix[1:])
    os.replace(file.name, path)
    return figure
