"""bench: a whole saved model, dense and sparse side by side."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel

from ..opening import open_model
from .accuracy import accuracy, batches
from .result import Bench, Latency, Measured
from .timing import NEW_TOKENS, PROMPT, decoding, random_tokens, seconds, threads_of_torch
from .variants import Forward, Runtime, Variant, forward_of, write_variants

SHAPES = ((1, 128), (8, 128), (1, 32))


def bench(
    folder: str | os.PathLike,
    *,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    threads: int | None = None,
    repeats: int = 20,
    others: Mapping[str, Runtime] | None = None,
    texts: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
) -> Bench:
    """Measure a saved model, dense in fp32 and in bf16 and sparse in fp32: latency, decoding, memory, file, accuracy.

    All are measured in this process in turn, on the same random tokens, but for the memory, which is that of a new
    process that opens one of them and computes a batch of the first shape. A model that generates also decodes 64
    tokens after a prompt of 32, greedily and with its cache; the time of the prompt counts.

    Args:
        folder: the model, an encoder, classifier or causal language model: a sparse checkpoint, or a dense one with
            zeros.
        shapes: of the batches, (sequences, tokens) each.
        threads: how many torch computes with; None as many as now.
        repeats: how many rounds count.
        others: the model in other runtimes, by name, to measure beside it.
        texts: what a classifier's accuracy is measured on, with its tokenizer from the folder, as `report` does.
        labels: the class of each of them.

    Raises:
        ValueError: if the folder holds no such model, a shape is empty or longer than the model reads, or texts are
            given that are not all labelled, or to a model that does not classify them.
        RuntimeError: if the process that measures the memory fails, as where memory is short.
    """
    others = others or {}
    if repeats < 1 or (threads is not None and threads < 1):
        raise ValueError(f"repeats={repeats}, threads={threads}: expected at least 1.")
    if not shapes or any(size < 1 for shape in shapes for size in shape):
        raise ValueError(f"shapes={shapes}: expected at least one, (sequences, tokens) each, of at least 1.")
    if len(texts or []) != len(labels or []):
        raise ValueError(f"{len(texts or [])} texts have {len(labels or [])} labels: expected one for each.")
    with threads_of_torch(threads), tempfile.TemporaryDirectory() as work:
        variants = write_variants(_opened(folder, shapes), Path(folder), Path(work))
        models = {variant.name: variant.open() for variant in variants}
        forwards = {name: forward_of(model) for name, model in models.items()}
        forwards |= {name: other.forward for name, other in others.items()}
        right = {}
        if texts:
            data = batches(AutoTokenizer.from_pretrained(folder), texts)
            right = {name: accuracy(forward, data, labels, name) for name, forward in forwards.items()}
        generators = {name: model for name, model in models.items() if model.can_generate()}
        generators |= {name: other.generator for name, other in others.items() if other.generator is not None}
        runs = (repeats + 1) * (len(shapes) * (len(models) + len(others)) + len(generators))
        with tqdm(total=len(variants) + runs, desc="memory") as progress:
            resident = {variant.name: _resident_bytes(variant, shapes[0], progress) for variant in variants}
            vocab_size = models[variants[0].name].config.vocab_size
            latency = _latency(forwards, vocab_size, shapes, repeats, progress)
            speed = _tokens_per_second(generators, vocab_size, repeats, progress) if generators else {}
        sizes = {variant.name: variant.file_bytes for variant in variants}
        sizes |= {name: other.file_bytes for name, other in others.items()}
    first = models[variants[0].name]
    return Bench(
        model=type(first).__name__,
        machine=_processor(),
        threads=threads or torch.get_num_threads(),
        repeats=repeats,
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        measured=tuple(
            Measured(name, found, speed.get(name), resident.get(name), sizes[name], right.get(name))
            for name, found in latency.items()
        ),
    )


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """Shapes as the command has them, such as "1x128,8x128".

    Raises:
        ValueError: if it does not read so.
    """
    try:
        return [(int(sequences), int(tokens)) for sequences, tokens in (one.split("x") for one in text.split(","))]
    except ValueError:
        raise ValueError(f"The shapes {text!r} are not sequences x tokens: expected such as 1x128,8x128.") from None


def _opened(folder: str | os.PathLike, shapes: Sequence[tuple[int, int]]) -> PreTrainedModel:
    model = open_model(folder)
    if model.config.is_encoder_decoder or model.main_input_name != "input_ids":
        raise ValueError(
            f"{str(folder)!r} holds a {type(model).__name__}: expected an encoder, a classifier of texts or a causal "
            "language model, which read input_ids and attention_mask and nothing else."
        )
    longest = max(tokens for _, tokens in shapes)
    if model.can_generate():
        longest = max(longest, PROMPT + NEW_TOKENS)
    reads = getattr(model.config, "max_position_embeddings", None)
    if reads is not None and longest > reads:
        raise ValueError(
            f"The {type(model).__name__} in {str(folder)!r} reads {reads} tokens, but {longest} are to be measured: "
            f"choose shorter shapes; a model that generates needs {PROMPT + NEW_TOKENS}."
        )
    return model


def _resident_bytes(variant: Variant, shape: tuple[int, int], progress: tqdm) -> int:
    command = [sys.executable, "-W", "ignore", "-m", "peft_pst.bench.memory", variant.folder]
    command += ["--shape", "{}x{}".format(*shape), "--threads", str(torch.get_num_threads())]
    run = subprocess.run(command + ["--sparse"] * variant.sparse, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"The process that measures the memory of {variant.name} ended with:\n{run.stderr}")
    progress.update()
    return json.loads(run.stdout)["resident_bytes"]


def _latency(
    forwards: Mapping[str, Forward],
    vocab_size: int,
    shapes: Sequence[tuple[int, int]],
    repeats: int,
    progress: tqdm,
) -> dict[str, dict[str, Latency]]:
    """By name, and then by shape."""
    found = {name: {} for name in forwards}
    for sequences, tokens in shapes:
        shape = f"{sequences}x{tokens}"
        progress.set_description(shape)
        for name, taken in seconds(forwards, random_tokens(vocab_size, sequences, tokens), repeats, progress).items():
            found[name][shape] = Latency(*(1e3 * float(time) for time in np.percentile(taken, (50, 95))))
    return found


def _tokens_per_second(
    models: Mapping[str, PreTrainedModel], vocab_size: int, repeats: int, progress: tqdm
) -> dict[str, float]:
    progress.set_description("decoding")
    prompt = random_tokens(vocab_size, 1, PROMPT)
    taken = seconds({name: decoding(model) for name, model in models.items()}, prompt, repeats, progress)
    return {name: NEW_TOKENS / statistics.median(times) for name, times in taken.items()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
