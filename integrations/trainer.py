"""transformers.Trainer: the sparsity schedule as a callback."""

import warnings
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_pst.optimizer import MAX_FACTOR_LR, parameter_kinds
from peft_pst.schedule import SparsityScheduler


class PSTCallback(TrainerCallback):
    """Moves a model along the schedule of its `PSTConfig`, one step per optimizer step.

    Use it as `Trainer(..., callbacks=[PSTCallback()])`. It reads the schedule from the adapter's config and the length
    of the training from the Trainer, goes on where a checkpoint stopped, and logs `sparsity` beside the loss: in the
    Trainer's `log_history`, on its progress bar, and to the callbacks that come after it.

    With `load_best_model_at_end`, only checkpoints at the final sparsity are candidates: an earlier one is denser, so
    its better metric says nothing.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self.scheduler = SparsityScheduler(model, state.max_steps, state.global_step)
        self._forget_denser_best(state)
        _check_learning_rate(model, kwargs.get("optimizer"))

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
            logs["sparsity"] = state.log_history[-1]["sparsity"] = self.scheduler.get_sparsity()

    def _forget_denser_best(self, state: TrainerState) -> None:
        if not self.scheduler.is_final():
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None


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
