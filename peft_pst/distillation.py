"""Distillation: losses against a dense teacher, by default the frozen weights that are under the mask anyway."""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from .labels import IGNORED, predicts_next, without_adapter
from .losses import (
    bernoulli_kl,
    kl_divergence,
    last_hidden_state_loss,
    make_projection,
    select_channels,
    square_head,
    squared_error,
)
from .mode import evaluating
from .sharded import is_sharded, reshard

LOSSES = ("logits", "last_hidden_state", "hidden_states")


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """What training against a dense teacher adds to the task's loss.

    The whole loss is `task` times the task's, plus each of the three others times its weight.

    Args:
        teacher (*optional*):
            `None` for the frozen base model, which the adapter is switched off for: it takes no memory, but knows the
            task only as far as the base model does. The folder of a PEFT adapter that was trained on the same base
            model, such as a LoRA: it shares the frozen weights. Or a model, of the same vocabulary or classes.
        task (`float`):
            Weight of the loss that the model computes from the labels.
        logits (`float`):
            Weight of T² KL(teacher || student) of the softened predictions (Hinton et al., arXiv 1503.02531); where
            a text has several labels, the mean over them. Of a regression the mean squared difference, without T.
        last_hidden_state (`float`):
            Weight of half the squared distance of the last hidden states (LightChatGLM). That of a student which
            `peft_pst.compress` made narrower is taken over the channels that it kept.
        hidden_states (`float`):
            Weight of SquareHead (arXiv 2310.06927): of each layer the squared distance of the hidden states, relative
            to the teacher's, and the mean over the layers.
        temperature (`float`):
            T, that logits are divided by.
        projection (`bool`):
            Whether the last hidden state goes through a linear layer to all channels of the teacher, and is compared
            there. It is `Distillation.projection`, trains with the student, and is no part of it.

    Raises:
        ValueError: if a weight is negative, all of the teacher's are zero, the temperature is not positive, or there
            is a projection and no weight for what it is of.
    """

    teacher: nn.Module | str | os.PathLike | None = None
    task: float = 1.0
    logits: float = 1.0
    last_hidden_state: float = 0.0
    hidden_states: float = 0.0
    temperature: float = 2.0
    projection: bool = False

    def __post_init__(self) -> None:
        for name in ("task", *LOSSES):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}: expected the weight of a loss, at least 0.")
        if not any(getattr(self, name) for name in LOSSES):
            raise ValueError(f"{', '.join(LOSSES)} are all 0, so that the teacher teaches nothing: give one a weight.")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: expected more than 0; 1 leaves logits as they are.")
        if self.projection and not self.last_hidden_state:
            raise ValueError("projection=True is of the last hidden state: give last_hidden_state a weight.")

    @classmethod
    def hybrid(
        cls, teacher: nn.Module | str | os.PathLike, lambda_: float = 0.65, **choices: Any
    ) -> DistillationConfig:
        """lambda · the teacher's soft labels + (1 - lambda) · the task's loss  (LightChatGLM).

        Args:
            teacher: as above, tuned on the task.
            lambda_: the share of the soft labels, at temperature 1.
            **choices: other arguments, such as `last_hidden_state`.

        Raises:
            ValueError: if lambda is not above 0 and at most 1.
        """
        if not 0 < lambda_ <= 1:
            raise ValueError(f"lambda_={lambda_}: expected the share of the soft labels, above 0 and at most 1.")
        return cls(teacher, task=1 - lambda_, logits=lambda_, temperature=1.0, **choices)

    @property
    def needs_hidden_states(self) -> bool:
        """Whether teacher and student give their hidden states."""
        return bool(self.last_hidden_state or self.hidden_states)


class Distillation:
    """The teacher of a model, and its losses.

    Attributes:
        projection (`nn.Linear` or `None`): [channels of the teacher, channels of the student], fp32. Its parameters
            are for the optimizer, beside the student's.

    Args:
        model: the student, with its adapter, or without one, such as what `peft_pst.compress` returns.
        config: what is distilled.

    Raises:
        ValueError: if the teacher is to have the frozen weights of the model, and the model has no adapter.
    """

    def __init__(self, model: nn.Module, config: DistillationConfig) -> None:
        self.config = config
        self._student = model
        self._teacher = config.teacher
        if not isinstance(config.teacher, nn.Module):
            if not isinstance(model, PeftModel):
                raise ValueError(
                    f"teacher={config.teacher!r} is about the frozen weights under an adapter, but the model is a "
                    f"{type(model).__name__} without one: give a model as the teacher, or call get_peft_model first."
                )
            if config.teacher is not None:
                self._teacher = _adapted(model, config.teacher)
            elif config.logits and any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules()):
                _warn_of_the_head()
        if self._teacher is not None:
            self._teacher.eval()
        own = without_adapter(model).config
        wider = own if self._teacher is None else without_adapter(self._teacher).config
        compression = getattr(own, "compression", {})
        self._channels = compression.get("channels")
        if self._channels and compression["hidden_size"] != wider.hidden_size:
            self._channels = None  # they are of another teacher
        self.projection = None
        if config.projection:
            self.projection = make_projection(own.hidden_size, wider.hidden_size, self._channels).to(model.device)

    def request(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of the student, with what the losses need of its outputs."""
        return {**inputs, "output_hidden_states": True} if self.config.needs_hidden_states else dict(inputs)

    @torch.no_grad()
    def teach(self, inputs: Mapping[str, Any]) -> ModelOutput:
        """What the teacher gives for the inputs, in evaluation mode and without a gradient. It does not see labels,
        but where an encoder-decoder makes its decoder's inputs from them."""
        kept = {name: value for name, value in self.request(inputs).items() if name != "num_items_in_batch"}
        base = without_adapter(self._student)
        if not base.config.is_encoder_decoder:
            kept.pop("labels", None)
        if base.can_generate():
            kept["use_cache"] = False
        with ExitStack() as stack:
            teacher = self._teacher
            if teacher is None:
                teacher = self._student
                stack.enter_context(evaluating(teacher))
                stack.enter_context(teacher.disable_adapter())
                # on its way out it thaws a head: the sharded one has to, which the checkpoint knows
                stack.callback(reshard, teacher)
            else:
                self._place(teacher, next(value.device for value in kept.values() if isinstance(value, Tensor)))
            return teacher(**kept)

    def _place(self, teacher: nn.Module, device: torch.device) -> None:
        """Move the teacher where the inputs are: sharding moves a student only after its Trainer was made."""
        if not isinstance(self.config.teacher, nn.Module) and any(map(is_sharded, self._student.parameters())):
            raise ValueError(
                f"teacher={self.config.teacher!r} shares the frozen weights of the student, but these are spread over "
                "processes: give the teacher as a model of its own, or None for the frozen weights themselves."
            )
        if next(teacher.parameters()).device != device:
            teacher.to(device)

    def losses(self, inputs: Mapping[str, Any], student: ModelOutput, teacher: ModelOutput) -> dict[str, Tensor]:
        """Each loss that has a weight, unweighted: the mean over the tokens, or texts, that count."""
        config, found = self.config, {}
        if config.logits:
            kept = [_predictions(self._student, inputs, output) for output in (student, teacher)]
            found["logits"] = self._logits(*kept, student)
        if config.needs_hidden_states:
            mask = _mask(self._student, inputs)
            states, expected = _hidden_states(student), _hidden_states(teacher)
            if config.last_hidden_state:
                found["last_hidden_state"] = self._last_hidden_state(states[-1], expected[-1], mask)
            if config.hidden_states:
                found["hidden_states"] = square_head(states, expected, mask)
        return found

    def _logits(self, student: Tensor, teacher: Tensor, output: ModelOutput) -> Tensor:
        of_texts = "logits" in output and output.logits.ndim == 2
        # transformers settles the problem in the first forward with labels, by their dtype
        problem = getattr(without_adapter(self._student).config, "problem_type", None) if of_texts else None
        if problem == "regression" or (of_texts and student.shape[-1] == 1):
            return squared_error(student, teacher)
        loss = bernoulli_kl if problem == "multi_label_classification" else kl_divergence
        return loss(student, teacher, self.config.temperature)

    def _last_hidden_state(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        if self.projection is not None:
            student = self.projection(student.float())
        return last_hidden_state_loss(student, select_channels(teacher, student.shape[-1], self._channels), mask)

    def total(self, task: Tensor, losses: Mapping[str, Tensor]) -> Tensor:
        """All of them together, weighted."""
        return self.config.task * task + sum(getattr(self.config, name) * loss for name, loss in losses.items())


def _predictions(model: nn.Module, inputs: Mapping[str, Any], output: ModelOutput) -> Tensor:
    """The logits that count, [rows, classes]: of texts, or of tokens whose labels do; of answers those of where they
    start and then of where they end, [2 rows, tokens]."""
    if "start_logits" in output:
        return torch.cat([output.start_logits, output.end_logits])
    if "logits" not in output:
        raise ValueError(
            f"{type(without_adapter(model)).__name__} has no head, and so no logits to distil: give "
            "DistillationConfig(logits=0) and a weight for hidden_states or last_hidden_state."
        )
    logits = output.logits
    if logits.ndim == 2:
        return logits
    labels, mask = inputs.get("labels"), inputs.get("attention_mask")
    keep = mask.bool() if labels is None and mask is not None else None if labels is None else labels != IGNORED
    if keep is None:
        keep = logits.new_ones(logits.shape[:-1], dtype=torch.bool)
    if predicts_next(model):
        logits, keep = logits[:, :-1], keep[:, 1:]
    return logits[keep]


def _mask(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
    """Which hidden states count: those of real tokens, in an encoder-decoder of the decoder's."""
    if without_adapter(model).config.is_encoder_decoder:
        return inputs["labels"] != IGNORED if "labels" in inputs else None
    mask = inputs.get("attention_mask")
    return None if mask is None else mask.bool()


def _hidden_states(output: ModelOutput) -> tuple[Tensor, ...]:
    return output.decoder_hidden_states if "decoder_hidden_states" in output else output.hidden_states


def _adapted(model: PeftModel, folder: str | os.PathLike) -> PeftModel:
    """The dense model under an adapter, with another adapter. Its frozen weights are those of the student."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    dense = copy.deepcopy(model, shared)
    for name, module in list(dense.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):  # a head that the student trains
            dense.set_submodule(name, module.original_module)
    return PeftModel.from_pretrained(dense.unload(), folder)


def _warn_of_the_head() -> None:
    warnings.warn(
        "The student trains modules of its own beside the adapter, such as a new head, and the frozen base model has "
        "them untrained: its logits teach nothing then. Give DistillationConfig a teacher that knows the task, or "
        "logits=0 and a weight for hidden_states.",
        stacklevel=3,
    )
