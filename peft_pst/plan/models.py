"""The models that a plan is about, made from a config alone: on the meta device, where tensors have no contents."""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
)

from ..config import PSTConfig
from ..opening import AUTO_CLASSES

LORA_RANK = 8


def task_of(config: PretrainedConfig, pst_config: PSTConfig) -> str:
    """The task that is trained: the adapter's; else that of the config's architecture; else what the model is for, in
    an encoder without a head classification.

    Raises:
        ValueError: if no class of transformers trains such a model.
    """
    known = [task for task, auto in AUTO_CLASSES.items() if type(config) in auto._model_mapping]
    architectures = config.architectures or []
    named = [task for task in known if _class_name(config, task) in architectures]
    encoder = type(config) in AutoModelForMaskedLM._model_mapping and not config.is_encoder_decoder
    guessed = "SEQ_2_SEQ_LM" if config.is_encoder_decoder else "SEQ_CLS" if encoder else "CAUSAL_LM"
    task = str(getattr(pst_config.task_type, "value", pst_config.task_type) or (named or [guessed])[0])
    if task not in known:
        raise ValueError(
            f"A {type(config).__name__} has no model for the task {task!r}: transformers' Auto classes train it for "
            f"{known}. Give a PSTConfig with such a task_type, or the config of a model that has one."
        )
    return task


def _class_name(config: PretrainedConfig, task: str) -> str:
    cls = AUTO_CLASSES[task]._model_mapping[type(config)]
    return (cls[0] if isinstance(cls, tuple) else cls).__name__


def build(
    config: PretrainedConfig, task: str, dtype: torch.dtype, gradient_checkpointing: bool = False
) -> PreTrainedModel:
    """The model of a config for a task, in training mode; from a copy of the config."""
    with torch.device("meta"):
        model = AUTO_CLASSES[task].from_config(copy.deepcopy(config), dtype=dtype)
    if gradient_checkpointing:
        # there is no generator whose state could be kept
        options = {"use_reentrant": False, "preserve_rng_state": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model.train()


def add_pst(model: PreTrainedModel, task: str, pst_config: PSTConfig) -> PeftModel:
    """The model with PST layers."""
    pst_config = copy.deepcopy(pst_config)
    pst_config.task_type = task
    with torch.device("meta"):
        return get_peft_model(model, pst_config)


def add_lora(model: PreTrainedModel, task: str, pst_config: PSTConfig) -> PeftModel:
    """The model with LoRA on the modules that `pst_config`, the config of a PST model, has found."""
    lora_config = LoraConfig(
        r=LORA_RANK,
        task_type=task,
        target_modules=pst_config.target_modules,
        exclude_modules=pst_config.exclude_modules,
        layers_to_transform=pst_config.layers_to_transform,
        layers_pattern=pst_config.layers_pattern,
    )
    with torch.device("meta"):
        return get_peft_model(model, lora_config)


def make_batch(task: str, batch_size: int, tokens: int) -> dict[str, Tensor]:
    """What the model of a task gets in a training step."""

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device="meta")

    inputs = {"input_ids": integers(batch_size, tokens), "attention_mask": integers(batch_size, tokens)}
    if task == "QUESTION_ANS":
        return {**inputs, "start_positions": integers(batch_size), "end_positions": integers(batch_size)}
    if task == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = integers(batch_size, tokens)
    return {**inputs, "labels": integers(batch_size) if task == "SEQ_CLS" else integers(batch_size, tokens)}


def num_experts(config: PretrainedConfig) -> int:
    """Over how many experts a layer spreads its tokens; 1 if it is no mixture of experts."""
    text = config.get_text_config()
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return max(getattr(text, name, None) or 1 for name in names)
