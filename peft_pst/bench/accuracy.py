"""The accuracy of a classifier, in whatever runs it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..report.behaviour import BATCH_SIZE, MAX_LENGTH
from .variants import Forward


def batches(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[dict[str, Tensor]]:
    """Inputs of a model, texts of up to `MAX_LENGTH` tokens: `input_ids` and `attention_mask`."""
    return [
        dict(
            tokenizer(
                list(texts[start : start + BATCH_SIZE]),
                padding=True,
                truncation=True,
                max_length=MAX_LENGTH,
                return_token_type_ids=False,
                return_tensors="pt",
            )
        )
        for start in range(0, len(texts), BATCH_SIZE)
    ]


@torch.inference_mode()
def accuracy(forward: Forward, data: Sequence[dict[str, Tensor]], labels: Sequence[int], name: str) -> float:
    """The share of texts whose class is the likeliest one.

    Raises:
        ValueError: if it does not predict one class for each text.
    """
    found = [torch.as_tensor(forward(**batch)) for batch in tqdm(data, desc=f"accuracy, {name}")]
    if found[0].ndim != 2:
        raise ValueError(
            f"The output for {len(data[0]['input_ids'])} texts has the shape {tuple(found[0].shape)}: labels need a "
            "model that classifies texts, [texts, classes]. Leave them out."
        )
    return float((torch.cat(found).argmax(-1) == torch.tensor(labels)).float().mean())
