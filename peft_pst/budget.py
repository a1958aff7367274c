"""The budget: how many entries each weight may keep, and which masks follow from it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .patterns import GroupsOf, Units, keep_largest

if TYPE_CHECKING:
    from .linear import Linear

# Under one budget for the model, no weight keeps less than this share of what a budget of its own would leave it.
FLOOR = 0.1


def set_sparsity(layers: Iterable[Linear], sparsity: float, adapter_name: str | None = None) -> None:
    """Prune layers to a sparsity from now on: those of one config together, as its budget and pattern ask.

    Args:
        layers: layers with the adapter.
        sparsity: the share of pruned entries, in [0, 1). Whole units of the pattern are pruned, as many as fit.
        adapter_name: the adapter; by default the active one of each layer.

    Raises:
        ValueError: if `sparsity` is not in [0, 1) or more than the pattern allows, an adapter is merged, or an
            importance lacks the data that it needs.
    """
    by_config: dict[int, list[Target]] = {}
    for layer in layers:
        target = Target(layer, adapter_name or layer.active_pst_adapter)
        layer.check_sparsity(target.adapter, sparsity)
        by_config.setdefault(id(layer.pst_config[target.adapter]), []).append(target)
    for targets in by_config.values():
        _set_sparsity(targets, sparsity)


class Target(NamedTuple):
    """One adapter of one layer."""

    layer: Linear
    adapter: str


def _set_sparsity(targets: list[Target], sparsity: float) -> None:
    waiting = [target for target in targets if target.layer.boost_waits(target.adapter) and sparsity > 0]
    _prune(targets, sparsity)
    for layer, adapter in waiting:
        layer.start_boost(adapter)


def _prune(targets: list[Target], sparsity: float) -> None:
    config = targets[0].layer.pst_config[targets[0].adapter]
    if not config.keeps_masks:
        for layer, adapter in targets:
            layer.pst_num_pruned[adapter].fill_(layer.pst_pattern[adapter].num_pruned(layer.shape, sparsity))
        return
    groups: dict[str, list[Target]] = {}
    for target in targets:
        groups.setdefault(target.layer.pst_group[target.adapter], []).append(target)
    if config.budget == "global":
        _prune_globally(list(groups.values()), sparsity)
    else:
        for group in groups.values():
            _prune_group(group, sparsity)


def _prune_group(group: list[Target], sparsity: float) -> None:
    layer, adapter = group[0]
    pattern = layer.pst_pattern[adapter]
    if isinstance(pattern, GroupsOf):
        mask = pattern.mask(layer.importance(adapter), pattern.num_pruned(layer.shape, sparsity))
        layer.keep_mask(adapter, mask)
    else:
        scores = _scores(group)
        _keep(group, keep_largest(scores, int(scores.numel() * sparsity)))


def _prune_globally(groups: list[list[Target]], sparsity: float) -> None:
    scores = [_scores(group) for group in groups]
    sizes = [
        sum(layer.shape.numel() for layer, _ in group) // s.numel() for group, s in zip(groups, scores, strict=True)
    ]
    keeps = keep_globally(scores, sizes, sparsity)
    for group, keep in zip(groups, keeps, strict=True):
        _keep(group, keep)


def _scores(group: list[Target]) -> Tensor:
    """The importance of each unit that the weights of a group share."""
    return sum(layer.pst_pattern[adapter].scores(layer.importance(adapter)) for layer, adapter in group)


def _keep(group: list[Target], keep: Tensor) -> None:
    for layer, adapter in group:
        pattern: Units = layer.pst_pattern[adapter]
        layer.keep_mask(adapter, pattern.expand(keep.to(layer.get_base_layer().weight.device), layer.shape))


def keep_globally(scores: list[Tensor], sizes: list[int], sparsity: float) -> list[Tensor]:
    """Which units of several weights stay under one budget for all of them.

    The least important units are pruned, wherever they are, up to the first that does not fit into
    `int(entries * sparsity)` entries.
    Units of different sizes compete by their importance an entry. Of each weight the `FLOOR` of what `1 - sparsity`
    would leave it stays, at least one unit.

    Args:
        scores: the importance of the units of each weight, any shapes.
        sizes: how many entries a unit of each weight has.
        sparsity: the share of all entries that is pruned.

    Returns:
        A mask in the shape of each of the scores, bool.
    """
    device, counts = scores[0].device, [s.numel() for s in scores]
    budget = int(sum(size * count for size, count in zip(sizes, counts, strict=True)) * sparsity)
    floors = [max(1, math.ceil(FLOOR * (1 - sparsity) * count)) for count in counts]
    protected = torch.cat(
        [keep_largest(s, s.numel() - floor).flatten().to(device) for s, floor in zip(scores, floors, strict=True)]
    )
    worth = torch.cat([s.flatten().to(device) / size for s, size in zip(scores, sizes, strict=True)])
    worth = worth.masked_fill_(protected, torch.inf)
    if len(set(sizes)) == 1:
        keep = keep_largest(worth, min(budget // sizes[0], sum(counts) - sum(floors)))
    else:
        order = worth.argsort(stable=True)
        size = torch.tensor(sizes, device=device).repeat_interleave(torch.tensor(counts, device=device))
        fits = (size[order].cumsum(0) <= budget) & ~protected[order]
        keep = torch.ones_like(protected)
        keep[order[fits]] = False
    return [part.view(s.shape) for part, s in zip(keep.split(counts), scores, strict=True)]
