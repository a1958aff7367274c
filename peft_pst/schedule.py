"""The budget over the steps of a training: how many entries are pruned after how many optimizer steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.optim import Optimizer

from .budget import set_sparsity
from .decay import decay_masked
from .layer import PSTLayer, active_layers, flip_rates, overall_sparsity

if TYPE_CHECKING:
    from .config import PSTConfig

# what is left of the way from the final to the initial sparsity, after the share p of the ramp
SCHEDULES = {
    "cubic": lambda p: (1 - p) ** 3,
    "linear": lambda p: 1 - p,
    "constant": lambda p: 0.0,
}


def ramp_bounds(config: PSTConfig, total_steps: int) -> tuple[int, int]:
    """The steps after which the sparsity begins to grow and is final, out of `total_steps` optimizer steps."""
    final = total_steps - round(config.cooldown_ratio * total_steps)
    if config.schedule == "constant":
        return 0, 0
    return min(round(config.warmup_ratio * total_steps), final), final


def sparsity_at(config: PSTConfig, step: int, total_steps: int) -> float:
    """The sparsity after `step` of `total_steps` optimizer steps (PST, arXiv 2205.11005).

    s_f + (s_0 - s_f) (1 - p)³ with p the share of the ramp that is done; s_0 before the ramp, s_f after it.
    """
    start, final = ramp_bounds(config, total_steps)
    if step >= final:
        return config.sparsity
    if step <= start:
        return config.initial_sparsity
    p = (step - start) / (final - start)
    return config.sparsity + (config.initial_sparsity - config.sparsity) * SCHEDULES[config.schedule](p)


def _brings_mask(layer: PSTLayer) -> bool:
    return layer.active_config.keeps_masks and layer.num_pruned > 0


class SparsityScheduler:
    """Moves a model along its sparsity schedule, like a torch learning rate scheduler: `step()` after each optimizer
    step. Creating it sets the sparsity of step 0.

    The schedule is read from the config of each layer's active adapter. With `mask_interval=k` sparsity and masks
    change at every k-th step and when the sparsity becomes final; between them they stay as they are. On several
    processes every one of them needs its own scheduler.

    Args:
        model (`nn.Module`):
            A model with PST layers; it may be wrapped (PeftModel, DistributedDataParallel).
        total_steps (`int`):
            Number of optimizer steps of the whole training.
        last_step (`int`):
            Number of optimizer steps that were made before, to go on with an adapter that was loaded; masks that it
            brought stay until the next step that changes them.
        optimizer (`Optimizer`, *optional*):
            The optimizer of the training, through which `masked_decay` acts.

    Raises:
        ValueError: if the model has no active PST adapter, `total_steps` is less than 1, the importance lacks
            calibration, or an adapter has `masked_decay` and there is no optimizer, or one with other parameters.
    """

    def __init__(
        self, model: nn.Module, total_steps: int, last_step: int = 0, optimizer: Optimizer | None = None
    ) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps={total_steps!r}: expected the number of optimizer steps, at least 1.")
        self.layers = active_layers(model)
        self.total_steps = total_steps
        for layer in self.layers:
            layer.check_sparsity(layer.active_pst_adapter, layer.active_config.sparsity)
        if any(layer.active_config.masked_decay for layer in self.layers):
            if optimizer is None:
                raise ValueError(
                    "The adapter has masked_decay, which acts through the optimizer: give it too, as in "
                    "SparsityScheduler(model, total_steps, optimizer=optimizer)."
                )
            decay_masked(optimizer, self)
        self._set_step(last_step, made_before=last_step > 0)

    def step(self) -> None:
        """Set the sparsity that follows the optimizer step just made."""
        self.set_step(self.last_step + 1)

    def set_step(self, step: int) -> None:
        """Set the sparsity that holds after `step` optimizer steps, for instance to resume a training."""
        self._set_step(step, made_before=False)

    def _set_step(self, step: int, made_before: bool) -> None:
        """`made_before` is a step whose masks were selected then, and brought by the adapter."""
        self.last_step = step
        by_sparsity: dict[float, list[PSTLayer]] = {}
        for layer in self.layers:
            config = layer.active_config
            is_due = step % config.mask_interval == 0 or step == ramp_bounds(config, self.total_steps)[1]
            if is_due and not (made_before and _brings_mask(layer)):
                by_sparsity.setdefault(sparsity_at(config, step, self.total_steps), []).append(layer)
        for sparsity, layers in by_sparsity.items():
            set_sparsity(layers, sparsity)

    def is_final(self) -> bool:
        """Whether all layers are at their final sparsity now."""
        return all(self.last_step >= ramp_bounds(layer.active_config, self.total_steps)[1] for layer in self.layers)

    def get_sparsity(self) -> float:
        """The share of the entries of all target weights that is pruned now."""
        return overall_sparsity(self.layers)

    def get_flip_rates(self) -> dict[str, float]:
        """How much the masks change, where they are kept for several steps under a constant sparsity: the shares of
        entries that differ from the mask before, `flip_rate`, and from the first one, `first_flip_rate`."""
        return flip_rates(self.layers)

    def state_dict(self) -> dict[str, int]:
        """What `load_state_dict` needs to go on: the number of steps made."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from the step of another scheduler's `state_dict()`."""
        self._set_step(state_dict["last_step"], made_before=True)
