"""open_model: the model in a folder, whatever kind of folder it is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import transformers
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

AUTO_CLASSES = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
}
"""The class of the model for each of PEFT's task types whose models have a loss."""


def open_model(folder: str | os.PathLike, base: str | os.PathLike | None = None) -> PreTrainedModel | PeftModel:
    """Open a saved model, dense or sparse, by the class that its config names, or an adapter on its base model.

    Args:
        folder: holds `config.json`, or `adapter_config.json`.
        base: the folder or the Hub's name of an adapter's base model. By default what the adapter says.

    Raises:
        ValueError: if it holds neither, is an adapter that does not name its base model, or names a class that
            transformers does not have.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").is_file():
        return _open_adapter(folder, base)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{str(folder)!r} holds neither config.json nor adapter_config.json: expected the folder of a saved model "
            "or adapter."
        )
    names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [None]
    model_class = getattr(transformers, names[0] or "", None)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise ValueError(
            f"config.json in {str(folder)!r} names the architecture {names[0]!r}, which transformers "
            f"{transformers.__version__} does not have: open the model in Python, with its own class."
        )
    return model_class.from_pretrained(folder, dtype="auto").eval()


def _open_adapter(folder: Path, base: str | os.PathLike | None) -> PeftModel:
    config = PeftConfig.from_pretrained(str(folder))
    base = base or config.base_model_name_or_path
    if base is None:
        raise ValueError(f"The adapter in {str(folder)!r} does not name its base model: give it as base.")
    auto_class = AUTO_CLASSES.get(config.task_type, AutoModel)
    head = {}
    if config.task_type in ("SEQ_CLS", "TOKEN_CLS"):
        head = {
            "num_labels": _num_labels(folder, base, auto_class),
            "ignore_mismatched_sizes": True,
        }  # the adapter brings the head
    model = auto_class.from_pretrained(base, dtype="auto", **head)
    return PeftModel.from_pretrained(model, folder).eval()


def _num_labels(folder: Path, base: str | os.PathLike, auto_class: type) -> int:
    """The number of classes of the head that was trained with an adapter, of whose layers the last has a row each."""
    config, shapes = AutoConfig.from_pretrained(base), []
    for num_labels in (2, 3):
        config.num_labels = num_labels
        with torch.device("meta"):
            model = auto_class.from_config(config)
        shapes.append({name: parameter.shape for name, parameter in model.named_parameters()})
    output = next(name for name, shape in shapes[0].items() if shape != shapes[1][name])
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return file.get_slice(f"base_model.model.{output}").get_shape()[0]
