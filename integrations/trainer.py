"""transformers.Trainer: the sparsity schedule as a callback, and in a Trainer of its own."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_pst.optimizer import MAX_FACTOR_LR, create_pst_optimizer, parameter_kinds
from peft_pst.schedule import SparsityScheduler

from .distilling import DistillingTrainer


class PSTCallback(TrainerCallback):
    """Moves a model along the schedule of its `PSTConfig`, one step per optimizer step.

    Use it as `Trainer(..., callbacks=[PSTCallback()])`. It reads the schedule from the adapter's config and the length
    of the training from the Trainer, goes on where a checkpoint stopped, lets masked weights decay if the config says
    so, and logs `sparsity` beside the loss, with what `SparsityScheduler.get_flip_rates` says: in the Trainer's
    `log_history`, on its progress bar, and to the callbacks that come after it.

    With `load_best_model_at_end`, only checkpoints at the final sparsity are candidates: an earlier one is denser, so
    its better metric says nothing.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self.scheduler = SparsityScheduler(model, state.max_steps, state.global_step, kwargs.get("optimizer"))
        self._forget_denser_best(state)
        _check_learning_rate(model, kwargs.get("optimizer"))
        if args.gradient_checkpointing:
            # embeddings are frozen, and reentrant checkpoints give no gradient to a block whose input has none
            model.enable_input_require_grads()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # what was best up to now was measured before this step
        self._forget_denser_best(state)
        self.scheduler.set_step(state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._forget_denser_best(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        if "loss" in logs:
            masks = masks_now(self.scheduler)
            logs.update(masks)
            state.log_history[-1].update(masks)

    def _forget_denser_best(self, state: TrainerState) -> None:
        if not self.scheduler.is_final():
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None


def masks_now(scheduler: SparsityScheduler) -> dict[str, float]:
    """What is logged of the masks."""
    return {"sparsity": scheduler.get_sparsity(), **scheduler.get_flip_rates()}


def _check_learning_rate(model: nn.Module, optimizer: Any) -> None:
    factors = {key for key, kind in parameter_kinds(model).items() if kind == "factor"}
    for group in getattr(optimizer, "param_groups", ()):
        lr = group.get("initial_lr", group["lr"])
        if lr > MAX_FACTOR_LR and any(id(parameter) in factors for parameter in group["params"]):
            warnings.warn(
                f"The PST factors train with a learning rate of {lr:g}. They start at N(0, 1), and above "
                f"{MAX_FACTOR_LR:g} a training loses accuracy or does not learn at all. Give them their own: "
                "Trainer(optimizers=(create_pst_optimizer(model), None)).",
                stacklevel=2,
            )
            return


def check_no_penalty(model: nn.Module, cause: str) -> None:
    """Raise ValueError if an adapter has a penalty, which is part of the loss that the model returns."""
    penalties = [getattr(config, "penalty", 0) for config in getattr(model, "peft_config", {}).values()]
    if any(penalties):
        raise ValueError(
            f"The adapter has penalty={max(penalties)}, which is part of the loss that the model returns, but with "
            f"{cause} the training has another loss and it would not count: set penalty=0 or leave that out."
        )


class PSTTrainer(DistillingTrainer):
    """A Trainer that follows the schedule of a `PSTConfig`, and may train against a dense teacher.

    It brings its own `PSTCallback`, and logs `sparsity` beside the loss, so that it reaches every reporter.

    Args:
        *args, **kwargs: those of `DistillingTrainer`, and so of `transformers.Trainer`.
        learning_rates (`Mapping[str, float]`, *optional*): those of `create_pst_optimizer` by their names, such as
            `{"lr": 3e-4, "head_lr": 1e-3}`. The Trainer makes that optimizer then, of the class that its arguments
            name and with their `learning_rate` for an `lr` that is not given. With FSDP and DeepSpeed this is the way,
            since there the Trainer takes no `optimizers`.

    Raises:
        ValueError: if `learning_rates` and an optimizer are given, the teacher does not fit the model, or the adapter
            has a penalty that would not count.
    """

    def __init__(
        self,
        *args: Any,
        learning_rates: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if learning_rates is not None and self.optimizer is not None:
            raise ValueError(
                f"learning_rates={dict(learning_rates)} are for the optimizer that the Trainer makes, but it was "
                "given one: leave out one of the two."
            )
        if self.compute_loss_func is not None or self.args.label_smoothing_factor:
            check_no_penalty(self.model, "compute_loss_func or label smoothing")
        distillation = kwargs.get("distillation")
        if distillation is not None and distillation.task == 0:
            check_no_penalty(self.model, "DistillationConfig(task=0)")
        self._learning_rates = learning_rates
        self._schedule = PSTCallback()
        self.pop_callback(PSTCallback)
        self.add_callback(self._schedule)

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """The optimizer, as in `Trainer`, with the learning rates that were given."""
        if self.optimizer is None and self._learning_rates is not None:
            kind, choices = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            choices = {**choices, "weight_decay": self.args.weight_decay, **self._learning_rates}
            self.optimizer = create_pst_optimizer(self.model, kind, **choices)
        return super().create_optimizer(*args)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, as in `Trainer`, with the sparsity beside the loss."""
        if "loss" in logs:
            logs.update(masks_now(self._schedule.scheduler))
        super().log(logs, *args, **kwargs)
