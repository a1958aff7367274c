"""Seconds of forwards and of decoding, several models in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm

PROMPT = 32
"""Tokens before those that are decoded."""
NEW_TOKENS = 64
PAUSE = 0.1
"""Seconds before each run, in which the threads of the one before it fall asleep: those of ONNX Runtime look for more
work for some 40 ms, on a core that the next one needs."""


def random_tokens(vocab_size: int, sequences: int, tokens: int) -> dict[str, Tensor]:
    """Input of a model, the same in each call: token ids and an attention mask of ones, int64 [sequences, tokens]."""
    ids = torch.randint(vocab_size, (sequences, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.inference_mode()
def seconds(
    models: Mapping[str, Callable[..., object]], inputs: Mapping[str, object], repeats: int, progress: tqdm
) -> dict[str, list[float]]:
    """How long each call of each model takes, s, wall clock: in rounds of one call each, so that a machine that slows
    down slows all of them. One round before them does not count."""
    taken = {name: [] for name in models}
    for _ in range(repeats + 1):
        for name, model in models.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            model(**inputs)
            taken[name].append(time.perf_counter() - start)
            progress.update()
    return {name: times[1:] for name, times in taken.items()}


def decoding(model: torch.nn.Module) -> Callable[..., Tensor]:
    """What decodes `NEW_TOKENS` tokens after a prompt, greedily, with the cache, and does not stop before."""

    def decode(**inputs: Tensor) -> Tensor:
        return model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            min_new_tokens=NEW_TOKENS,  # a token that ends the text does not end it
            max_new_tokens=NEW_TOKENS,
            pad_token_id=0,
        )

    return decode


@contextmanager
def threads_of_torch(threads: int | None) -> Iterator[None]:
    """Let torch compute with so many threads, for a while; None leaves their number as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
