"""DistillingTrainer: transformers.Trainer against a dense teacher."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_pst.distillation import Distillation, DistillationConfig
from peft_pst.labels import predicts_next, share_of_step

PROJECTION = "distillation_projection.safetensors"
"""The file of a projection in a checkpoint, beside the optimizer's."""


class DistillingTrainer(Trainer):
    """A Trainer whose model may learn from a dense teacher: any model, such as what `peft_pst.compress` returns.

    Of the distillation it logs `task_loss` and each loss of the teacher by its name, such as `logits_loss`, without
    its weight, as the mean over the steps since the last log.

    A projection trains in a group of its own, at the optimizer's default rate and without weight decay. It is in the
    checkpoints, so that a training goes on with it, and not in the saved model. Its gradients are clipped with those
    of the model.

    Args:
        *args, **kwargs: those of `transformers.Trainer`.
        distillation (`DistillationConfig`, *optional*): what the teacher adds to the loss of training. Under gradient
            accumulation batches weigh by their labels, as in the task's loss. Evaluation reports that loss alone.

    Raises:
        ValueError: if the teacher does not fit the model, or there is a `model_init`, whose model it would not know;
            or with a projection, if a learning rate scheduler is given, which would not know its group, or the model
            is to be sharded by FSDP or DeepSpeed.
    """

    def __init__(self, *args: Any, distillation: DistillationConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if distillation is not None and self.model_init is not None:
            raise ValueError(
                "model_init makes another model when training begins, but the distillation is of one that is there: "
                "give the Trainer the model."
            )
        # where a model is no language model, transformers' loss of a batch is a mean, whatever the step's labels
        self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs and predicts_next(self.model)
        self._distillation = None if distillation is None else Distillation(self.model, distillation)
        self._not_logged: dict[str, Tensor] = {}  # the sum of each loss since the last log
        self._logged_until = 0
        self._projection = None if distillation is None else self._distillation.projection
        if self._projection is None:
            return
        if self.lr_scheduler is not None:
            raise ValueError(
                "projection=True adds a group to the optimizer, which a scheduler that was made before does not know: "
                "give the Trainer optimizers=(optimizer, None), and name the scheduler in TrainingArguments."
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "projection=True trains beside the model, where FSDP and DeepSpeed do not see it: launch with DDP, or "
                "leave the projection out; the kept channels are compared then."
            )
        self._projection.to(self.args.device)
        self.add_callback(_ProjectionCallback(self._projection))
        clip = self.accelerator.clip_grad_norm_
        self.accelerator.clip_grad_norm_ = lambda parameters, *args, **kwargs: clip(
            [*parameters, self._projection.weight], *args, **kwargs
        )

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """The optimizer, as in `Trainer`, with the projection in it."""
        optimizer = super().create_optimizer(*args)
        if self._projection is not None:
            weight = self._projection.weight
            if not any(weight is parameter for group in optimizer.param_groups for parameter in group["params"]):
                optimizer.add_param_group({"params": [weight], "weight_decay": 0.0})
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch, as in `Trainer`; in training that of the teacher too."""
        if self._distillation is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.accelerator.autocast():
            taught = self._distillation.teach(inputs)  # before the student: its activations are gone by then
        asked = self._distillation.request(inputs)
        task, outputs = super().compute_loss(model, asked, True, num_items_in_batch)
        losses = self._distillation.losses(inputs, outputs, taught)
        if task.requires_grad and not all(loss.requires_grad for loss in losses.values()):
            raise ValueError(
                f"{sorted(losses)} have no gradient: {type(self).__name__} does not take its loss from the logits "
                "that the model returns, like TRL's SFTTrainer, whose head is fused. Make a subclass of it with "
                "compute_loss = transformers.Trainer.compute_loss, and of that and PSTTrainer yours, or of that and "
                "DistillingTrainer for a model without an adapter."
            )
        whole_step = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        if whole_step and num_items_in_batch is not None:
            share = share_of_step(self.model, inputs["labels"], num_items_in_batch)
            if self.args.average_tokens_across_devices:
                share = share * self.accelerator.num_processes
            losses, part = {name: share * loss for name, loss in losses.items()}, 1
        else:
            part = 1 / self.current_gradient_accumulation_steps  # which Trainer does to the loss after this
        of_batch = {f"{name}_loss": part * loss.detach() for name, loss in {"task": task, **losses}.items()}
        if not self._not_logged:
            self._logged_until = self.state.global_step
        self._not_logged = {name: loss + self._not_logged.get(name, 0) for name, loss in of_batch.items()}
        loss = self._distillation.total(task, losses)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of a batch, as in `Trainer`; DDP does not know the projection, so its gradient is
        averaged here."""
        loss = super().training_step(*args, **kwargs)
        if self._projection is not None and self.accelerator.sync_gradients:
            weight = self._projection.weight
            weight.grad = self.accelerator.reduce(weight.grad, "mean")
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, as in `Trainer`, with the teacher's losses beside the loss."""
        if "loss" in logs:
            logs.update(self._mean_losses())
        super().log(logs, *args, **kwargs)

    def _mean_losses(self) -> Mapping[str, float]:
        sums, self._not_logged = self._not_logged, {}
        steps = self.state.global_step - self._logged_until
        return {name: self.accelerator.gather(total).mean().item() / steps for name, total in sums.items()}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._projection is not None and self.args.should_save:
            save_file({"weight": self._projection.weight.detach()}, Path(output_dir, PROJECTION))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._projection is not None and checkpoint is not None:
            file = Path(checkpoint, PROJECTION)
            if not file.is_file():
                raise ValueError(
                    f"{os.fspath(checkpoint)!r} has no {PROJECTION}: it is of a training without a projection, or one "
                    "with save_only_model=True. Go on with projection=False, or begin anew."
                )
            self._projection.load_state_dict(load_file(file))
        super()._load_optimizer_and_scheduler(checkpoint)


class _ProjectionCallback(TrainerCallback):
    """The Trainer forgets only the gradients of its model."""

    def __init__(self, projection: nn.Module) -> None:
        self._projection = projection

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._projection.zero_grad()
