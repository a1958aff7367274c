"""Which labels count, and what part of a step's loss a batch has by them."""

from __future__ import annotations

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

IGNORED = -100
"""The label of what no loss looks at."""


def without_adapter(model: nn.Module) -> PreTrainedModel:
    """The model of transformers under an adapter, if there is one."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def predicts_next(model: nn.Module) -> bool:
    """Whether the logits of a token are about the next one."""
    base = without_adapter(model)
    return isinstance(base, PreTrainedModel) and base.can_generate() and not base.config.is_encoder_decoder


def share_of_step(model: nn.Module, labels: Tensor, num_items: Tensor | int) -> Tensor:
    """The part of a batch in a step whose batches have `num_items` labels together, a scalar: transformers weights
    the loss of the labels in the same way, where it accumulates gradients."""
    return ((labels[:, 1:] if predicts_next(model) else labels) != IGNORED).sum() / num_items
