"""Decay of masked weights (annealed SR-STE; AST, arXiv 2407.20584): it makes a mask settle while the weights train."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from .sharded import sharded_like

if TYPE_CHECKING:
    from .config import PSTConfig
    from .linear import Linear
    from .schedule import SparsityScheduler

_HANDLES: WeakKeyDictionary[Optimizer, Any] = WeakKeyDictionary()


def decay_at(config: PSTConfig, step: int, total_steps: int) -> float:
    """Lambda in the step after `step` of `total_steps` optimizer steps: it grows linearly from 0 to `masked_decay`
    over the share `masked_decay_warmup_ratio` of them, and stays."""
    warmup = config.masked_decay_warmup_ratio * total_steps
    return config.masked_decay * (min(1.0, step / warmup) if warmup else 1.0)


def decay_masked(optimizer: Optimizer, scheduler: SparsityScheduler) -> None:
    """Let masked weights decay after each step of a torch optimizer, until another scheduler comes or this one goes:

        W' <- W' - min(1, lr · lambda / (sqrt(v) + eps)) · (1 - M) ∘ W'

    v is Adam's second moment, unbiased, so that lambda is measured against gradients as in the paper, while the first
    moment knows nothing of the decay. Where an optimizer keeps none as Adam does, the denominator is 1. A step that a
    `GradScaler` skips decays nothing.

    Raises:
        ValueError: if the optimizer does not have the deltas themselves among its parameters.
    """
    while hasattr(optimizer, "optimizer"):  # those of accelerate
        optimizer = optimizer.optimizer
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if any(id(layer.pst_D[layer.active_pst_adapter]) not in known for layer in _decaying(scheduler)):
        raise ValueError(
            f"masked_decay acts on the deltas of update='full', but the parameters of this {type(optimizer).__name__} "
            "are others: give it the parameters of the model as they are now; DeepSpeed's ZeRO has copies of its own "
            "and does not go with masked_decay, FSDP2 does."
        )
    if optimizer in _HANDLES:
        _HANDLES.pop(optimizer).remove()
    of_scheduler = weakref.ref(scheduler)

    def hook(optimizer: Optimizer, *_: Any) -> None:
        scheduler = of_scheduler()
        if scheduler is not None:
            _decay(optimizer, scheduler)

    _HANDLES[optimizer] = optimizer.register_step_post_hook(hook)


@functools.cache
def _warn_of_another_optimizer() -> None:
    warnings.warn(
        "masked_decay is measured against the second moment that Adam keeps as exp_avg_sq. This optimizer keeps none, "
        "so that the decay of a step is lr * masked_decay alone, next to nothing for values that suit Adam: take "
        "torch.optim.AdamW, raise masked_decay, or set it to 0.",
        stacklevel=2,
    )


def _decaying(scheduler: SparsityScheduler) -> Iterator[Linear]:
    return (layer for layer in scheduler.layers if layer.active_config.masked_decay)


@torch.no_grad()
def _decay(optimizer: Optimizer, scheduler: SparsityScheduler) -> None:
    overflow = getattr(optimizer, "found_inf", None)  # a fused Adam runs in a step that a GradScaler skips
    if overflow is not None and bool(overflow):
        return
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for layer in _decaying(scheduler):
        adapter = layer.active_pst_adapter
        D, decay = layer.pst_D[adapter], decay_at(layer.active_config, scheduler.last_step, scheduler.total_steps)
        if D.grad is None or not decay:
            continue
        group = groups[id(D)]
        masked = sharded_like(D, layer.pruned_part(adapter))
        D.sub_(masked.mul_(_rate(group["lr"] * decay, group, optimizer.state[D])))


def _rate(numerator: float | Tensor, group: dict[str, Any], state: dict[str, Any]) -> float | Tensor:
    """The share of a masked weight that decays."""
    v = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
    if v is None or "betas" not in group:
        _warn_of_another_optimizer()
        return min(1.0, numerator)
    if type(v).dequantize is not Tensor.dequantize:  # torchao's, in 8 or 4 bits
        v = v.dequantize()
    step = torch.as_tensor(state["step"], dtype=torch.float64)  # in float32, as Adam has it, the first ones are rough
    correction = 1 - group["betas"][1] ** step
    return (numerator / (v / correction).sqrt_().add_(group["eps"])).clamp_(max=1)
