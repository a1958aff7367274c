"""What a sparse model does: how close it stays to the dense one, and how it bears damaged texts."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..mode import evaluating
from .tables import format_table

BATCH_SIZE = 32
MAX_LENGTH = 256
DAMAGED = 0.1
"""The share of words that are misspelt or left out."""


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """How close a model stays to the dense one, over `predictions` of them: texts, or tokens of a language model."""

    predictions: int
    agreement: float
    """The share in which both find the same class or token the likeliest."""
    kl: float
    """The mean Kullback-Leibler divergence of the model from the dense one, KL(dense || model), nats."""

    def table(self) -> str:
        """Its numbers."""
        header = ("predictions", "agreement with the dense model", "KL (nats)")
        return format_table(header, [(f"{self.predictions:,}", f"{self.agreement:.2%}", f"{self.kl:.4f}")])


@dataclasses.dataclass(frozen=True)
class Robustness:
    """Accuracy of a classifier on the texts as they are, and with one word in ten misspelt or left out."""

    clean: float
    typos: float
    dropped_words: float

    def table(self) -> str:
        """Its numbers."""
        header = ("accuracy", "with typos", "with dropped words")
        return format_table(header, [tuple(f"{accuracy:.2%}" for accuracy in dataclasses.astuple(self))])


def fidelity(model: nn.Module, dense: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Fidelity:
    """How close the predictions of a model are to those of the dense one, text by text or token by token.

    Raises:
        ValueError: if the two do not predict the same number of classes.
    """
    predictions, agreeing, divergence = 0, 0, 0.0
    ours, theirs = logits(model, tokenizer, texts, "fidelity"), logits(dense, tokenizer, texts)
    for own, expected in zip(ours, theirs, strict=True):
        if own.shape != expected.shape:
            raise ValueError(
                f"The model predicts {own.shape[-1]} classes, the dense one {expected.shape[-1]}: give the dense "
                "model of the same task."
            )
        own, expected = own.log_softmax(-1), expected.log_softmax(-1)
        predictions += len(own)
        agreeing += int((own.argmax(-1) == expected.argmax(-1)).sum())
        divergence += float((expected.exp() * (expected - own)).sum())
    return Fidelity(predictions, agreeing / predictions, divergence / predictions)


def robustness(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], labels: Sequence[int]
) -> Robustness:
    """The accuracy of a classifier on texts, and on the same texts damaged. The damage is the same in each call.

    Raises:
        ValueError: if the model does not predict one class for each text.
    """
    rng = random.Random(0)
    variants = (texts, [misspelt(text, rng) for text in texts], [without_words(text, rng) for text in texts])
    return Robustness(*(_accuracy(model, tokenizer, variant, labels) for variant in variants))


def misspelt(text: str, rng: random.Random) -> str:
    """A text in which one word in ten has a letter dropped, doubled, or exchanged with the next."""
    return _damaged(text, rng, lambda word: _typo(word, rng))


def without_words(text: str, rng: random.Random) -> str:
    """A text without one word in ten."""
    return _damaged(text, rng, lambda word: "")


@torch.no_grad()
def logits(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], task: str | None = None
) -> Iterator[Tensor]:
    """The predictions for texts, batch by batch, in fp32: [texts, classes], or [tokens, vocabulary]; for a `task` with
    a progress bar."""
    pads = tokenizer.pad_token is not None
    size = BATCH_SIZE if pads else 1
    device = next(model.parameters()).device
    with evaluating(model):
        for start in tqdm(range(0, len(texts), size), desc=task, disable=task is None):
            batch = tokenizer(
                list(texts[start : start + size]),
                padding=pads,
                truncation=True,
                max_length=MAX_LENGTH,
                return_tensors="pt",
            ).to(device)
            found = model(**batch).logits.float()
            # where each token is predicted, those that fill up a batch do not count
            yield found[batch["attention_mask"].bool()] if found.ndim == 3 else found


def _accuracy(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], labels: Sequence[int]
) -> float:
    classes = torch.cat([found.argmax(-1) for found in logits(model, tokenizer, texts, "accuracy")])
    if classes.shape != (len(labels),):
        raise ValueError(
            f"The model made {len(classes)} predictions for {len(labels)} texts: labels need a model that classifies "
            "texts. Leave them out for a language model."
        )
    return float((classes.cpu() == torch.tensor(labels)).float().mean())


def _damaged(text: str, rng: random.Random, damage: Callable[[str], str]) -> str:
    return " ".join(damage(word) if rng.random() < DAMAGED else word for word in text.split())


def _typo(word: str, rng: random.Random) -> str:
    place = rng.randrange(len(word))
    before, letter, after = word[:place], word[place], word[place + 1 :]
    return rng.choice((before + after, before + letter + letter + after, before + after[:1] + letter + after[1:]))
