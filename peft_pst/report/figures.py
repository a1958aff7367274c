"""Figures of a model's sparsity. They need matplotlib, which the extra `plot` brings."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..importance import PST
from ..layer import PSTLayer
from .sparsity import TensorSparsity, effective_weight, layer_type, weight_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PIXELS = 128
"""A mask is drawn with at most so many points a side, each the density of what it stands for."""


def plot_sparsity(rows: Sequence[TensorSparsity], path: str | os.PathLike) -> Figure:
    """Draw the sparsity of each weight as a horizontal bar and write the figure to `path` (.png, .svg or .pdf).

    Raises:
        ImportError: if matplotlib is not installed.
    """
    figure = _figure(8, 1 + 0.22 * len(rows))
    axes = figure.add_subplot()
    axes.barh([row.name for row in rows], [100 * row.sparsity for row in rows])
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set(xlim=(0, 100), xlabel="zeros in the weight (%)", title="Sparsity of each weight")
    axes.tick_params(axis="y", labelsize=7)
    return _written(figure, path)


def plot_depth(rows: Sequence[TensorSparsity], path: str | os.PathLike) -> Figure:
    """Draw the sparsity over the depth of the model, a line for each type of layer of a stack, and write it to `path`.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    figure = _figure(8, 4)
    axes = figure.add_subplot()
    profiles = defaultdict(list)
    for row in rows:
        if place := re.match(r"(.+?)\.(\d+)\.", row.name):  # a layer outside of the blocks has no depth
            profiles[place[1], layer_type(row.name)].append((int(place[2]), 100 * row.sparsity))
    stacks = {stack for stack, _ in profiles}
    for (stack, kind), profile in profiles.items():
        label = kind if len(stacks) == 1 else f"{stack}: {kind}"
        axes.plot(*zip(*profile, strict=True), marker="o", label=label)
    axes.set(ylim=(0, 100), xlabel="block", ylabel="zeros in the weight (%)", title="Sparsity over depth")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return _written(figure, path)


def plot_masks(model: nn.Module, path: str | os.PathLike, names: Sequence[str] | None = None) -> Figure:
    """Draw which entries of weights stay, beside the densities of their rows and columns, and write it to `path`.

    Args:
        model: as for `report`.
        names: the modules to draw. By default one of each type, from the middle of the model.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    names = names or _one_of_each_type(weight_names(model))
    figure = _figure(4 * min(len(names), 3), 4 * -(-len(names) // 3))
    parts = figure.subfigures(-(-len(names) // 3), min(len(names), 3), squeeze=False).flatten()
    for name, part in zip(names, parts, strict=False):
        density = (effective_weight(model.get_submodule(name)) != 0).float()
        axes = part.subplots(2, 2, sharex="col", sharey="row", width_ratios=(4, 1), height_ratios=(1, 4))
        rows, columns = density.shape
        axes[1, 0].imshow(_shrunk(density), extent=(0, columns, rows, 0), cmap="Greys", aspect="auto", vmin=0)
        axes[0, 0].plot(density.mean(0), linewidth=0.5)
        axes[1, 1].plot(density.mean(1), range(rows), linewidth=0.5)
        axes[0, 1].axis("off")
        axes[0, 0].set(ylabel="density", title=layer_type(name))
        axes[1, 0].set(xlabel="input", ylabel="output")
        axes[1, 1].set(xlabel="density")
    figure.suptitle("Which entries stay")
    return _written(figure, path)


def plot_scores(model: nn.Module, path: str | os.PathLike) -> Figure:
    """Draw how much each part of PST's importance, |W'|, alpha1 · A B and alpha2 · (R + C), varies over the entries of
    each weight, which is how much it has to say about the mask, and write it to `path`.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if no adapter in the model has that importance.
    """
    spreads = {}
    for name, module in model.named_modules():
        if isinstance(module, PSTLayer) and module.active_pst_adapter and module.active_config.importance == "pst":
            spreads[name] = [float(part.std()) for part in _score_parts(module)]
    if not spreads:
        raise ValueError("No layer has an active adapter with importance='pst': a merged model has no score any more.")
    figure = _figure(8, 4)
    axes = figure.add_subplot()
    for label, spread in zip(("|W'|", "α₁ · A B", "α₂ · (R + C)"), zip(*spreads.values(), strict=True), strict=True):
        axes.plot(range(len(spread)), spread, marker=".", label=label)
    axes.set(xlabel="layer, in the order of the model", ylabel="standard deviation", title="Parts of the importance")
    axes.set_yscale("log")
    axes.legend()
    return _written(figure, path)


def plot_flips(log_history: Sequence[dict[str, Any]], path: str | os.PathLike) -> Figure:
    """Draw how much of the masks changed over a training: the share of entries that flipped at the last selection, and
    that of those that differ from the first mask; and write it to `path`. Flips that do not die down as the training
    ends say that the masks have not settled.

    Args:
        log_history: the Trainer's, `trainer.state.log_history` or that in a checkpoint's `trainer_state.json`.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if no flips were logged.
    """
    logs = [entry for entry in log_history if "flip_rate" in entry]
    if not logs:
        raise ValueError(
            "The log history has no flip rates: they are logged beside the loss where masks are kept under a constant "
            "sparsity, as with PSTConfig.ast(). Train with PSTTrainer, or with PSTCallback, and look at logging_steps."
        )
    figure = _figure(8, 4)
    axes = figure.add_subplot()
    steps = [entry["step"] for entry in logs]
    for key, label in (("flip_rate", "at the last selection"), ("first_flip_rate", "since the first mask")):
        axes.plot(steps, [100 * entry[key] for entry in logs], marker=".", label=label)
    axes.set(xlabel="optimizer step", ylabel="entries of the masks (%)", title="Flips of the masks")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    return _written(figure, path)


@torch.no_grad()
def _score_parts(layer: PSTLayer) -> tuple[Tensor, Tensor, Tensor]:
    """The terms of the importance, [out, in] each: the score with the others' arguments zero."""
    method, weight, arguments = layer.inputs(layer.active_pst_adapter)
    of_update, (A, B, R, C) = method.split(arguments)
    importance: PST = method.importance
    updated = method.update.weight(weight, *of_update)
    zero = torch.zeros_like
    return (
        importance.score(updated, zero(A), B, zero(R), zero(C)),
        importance.score(zero(updated), A, B, zero(R), zero(C)),
        importance.score(zero(updated), zero(A), B, R, C),
    )


def _one_of_each_type(names: Sequence[str]) -> list[str]:
    members = defaultdict(list)
    for name in names:
        if layer_type(name) != name:
            members[layer_type(name)].append(name)
    return [group[len(group) // 2] for group in members.values()] or list(names)


def _shrunk(density: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(density[None], [min(size, PIXELS) for size in density.shape])[0]


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib: pip install 'peft-pst[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _written(figure: Figure, path: str | os.PathLike) -> Figure:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{os.getpid()}.{path.name}")
    figure.savefig(written, format=path.suffix[1:])
    os.replace(written, path)
    return figure
