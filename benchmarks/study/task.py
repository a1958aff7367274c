"""What a training of the study is about."""

from collections.abc import Callable
from dataclasses import dataclass

from datasets import DatasetDict
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Task:
    """A data set, a model, and how good a model is at it."""

    data: DatasetDict
    """`train`, tokenized for the collator; `validation`, which chooses; `test`."""
    collator: Callable
    task_type: str
    """Of PEFT."""
    load_model: Callable[[str | None], PreTrainedModel]
    """From a folder, or None for the pretrained model."""
    measure: Callable[[PreTrainedModel, str], dict[str, float]]
    """Metrics of a model on a split. The first one chooses learning rates; all of them are better when larger."""
