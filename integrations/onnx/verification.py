"""Whether a graph computes what PyTorch does, and has its zeros."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import graph

STEPS = 2
"""New tokens of a model with past."""


@dataclass(frozen=True)
class Difference:
    """The largest absolute difference of an output, and the largest absolute output of PyTorch."""

    largest: float
    scale: float


@torch.no_grad()
def difference(model: PreTrainedModel, exported: Callable) -> Difference:
    """Compare a model with its export on random batches of several sizes, with padding, and with past step by step.

    Args:
        model: the PyTorch model.
        exported: an `ORTModelFor…`, or what is called like one.

    Raises:
        ValueError: if the export has none of the model's outputs.
    """
    differences, scales = [], []
    torch_names = inspect.signature(model.forward).parameters
    for batch, mask in _batches(model, exported):
        expected = {name: value for name, value in batch.items() if name in torch_names}
        for theirs, reference in zip(_outputs(exported, batch), _outputs(model, expected), strict=True):
            for name, value in reference.items():
                if isinstance(value, Tensor) and value.is_floating_point() and theirs.get(name) is not None:
                    # a padded position of a decoder sees nothing, and computes nonsense
                    visible = mask[:, -value.shape[1] :].bool() if value.dim() == 3 and mask is not None else ...
                    differences.append((value - theirs[name])[visible].abs().max())
                    scales.append(value[visible].abs().max())
    if not differences:
        raise ValueError(f"The exported graph has none of the outputs of {type(model).__name__}: nothing to compare.")
    # torch's maximum, unlike Python's, is not a number if one of them is not
    return Difference(torch.stack(differences).max().item(), torch.stack(scales).max().item())


def check(found: Difference, tolerance: float) -> None:
    """Raise a ValueError if an output is further away than the tolerance, or not a number."""
    if not found.largest <= tolerance * max(1.0, found.scale):
        raise ValueError(
            f"An output of the exported graph is {found.largest:.1e} away from PyTorch's, where up to "
            f"{found.scale:.1e} large: more than the tolerance of {tolerance:.1e}. Nothing was written. If the model "
            "is usable with that, give a larger tolerance."
        )


def places(model: PreTrainedModel, folder: Path) -> dict[str, tuple[str, str]]:
    """Of each weight of a model that has zeros, the graph and the tensor in it that hold it, perhaps transposed."""
    held = {
        _fingerprint(array): (file.name, name)
        for file in sorted(folder.glob("*.onnx"))
        for name, array in graph.weights(file).items()
    }
    found = {}
    for name, weight in _with_zeros(model):
        place = held.get(_fingerprint(weight)) or held.get(_fingerprint(weight.T))
        if place is not None:
            found[name] = place
    return found


def missing(model: PreTrainedModel, places: dict[str, tuple[str, str]]) -> list[str]:
    """The weights that have zeros but no place."""
    return [name for name, _ in _with_zeros(model) if name not in places]


def count_zeros(
    model: PreTrainedModel, folder: Path, places: dict[str, tuple[str, str]]
) -> dict[str, tuple[int, int]]:
    """Of each weight that has a place, the zeros that it has, and how many of them are zeros in the file.

    Raises:
        ValueError: if a zero is no zero in the file.
    """
    files = {name: graph.weights(folder / name) for name in {file for file, _ in places.values()}}
    found = {}
    for name, weight in _with_zeros(model):
        if name not in places:
            continue
        file, tensor = places[name]
        zeros = weight == 0
        pruned = files[file][tensor] == 0
        counts = [int((pruned & side).sum()) for side in (zeros, zeros.T) if side.shape == pruned.shape]
        found[name] = (int(zeros.sum()), max(counts))
        if found[name][1] < found[name][0]:
            raise ValueError(
                f"{name!r} has {found[name][0]:,} zeros, of which only {found[name][1]:,} are zeros in {file}."
            )
    return found


def _fingerprint(array: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    return array.shape, hashlib.blake2b(np.ascontiguousarray(array)).digest()


def _with_zeros(model: PreTrainedModel) -> Iterator[tuple[str, np.ndarray]]:
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and (parameter == 0).any():
            yield name, parameter.detach().numpy()


def _batches(model: PreTrainedModel, exported: Any) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
    """Random batches, with what an export takes, and the mask of the positions that count (None: all)."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    longest = min(32, (getattr(config, "max_position_embeddings", None) or 64) // 2)

    def tokens(*shape: int, below: int | None = None) -> Tensor:
        return torch.randint(below or model.get_input_embeddings().num_embeddings, shape, generator=generator)

    for sequences, length in ((1, longest // 4), (3, longest), (2, longest // 2 + 1)):
        mask = torch.ones(sequences, length, dtype=torch.long)
        batch = {"input_ids": tokens(sequences, length), "attention_mask": mask}
        if config.is_encoder_decoder:
            mask[-1, length // 2 :] = 0
            yield {**batch, "decoder_input_ids": tokens(sequences, length // 2)}, None
            continue
        if "token_type_ids" in exported.input_names:
            batch["token_type_ids"] = tokens(sequences, length, below=config.type_vocab_size)
        if "position_ids" in exported.input_names:  # a decoder, padded on the left
            mask[-1, : length // 2] = 0
            batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        else:
            mask[-1, length // 2 :] = 0
        yield batch, mask


def _outputs(model: Callable, batch: dict[str, Tensor]) -> Iterator[Any]:
    """The output for a batch, and with past those of some more tokens."""
    output = model(**batch)
    yield output
    if output.get("past_key_values") is None:
        return
    new = "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"
    tokens = batch[new]
    for step in range(STEPS):
        batch[new] = tokens[:, step : step + 1]
        if new == "input_ids":
            batch["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
        if "position_ids" in batch:
            batch["position_ids"] = batch["position_ids"][:, -1:] + 1
        output = model(**batch, past_key_values=output["past_key_values"])
        yield output
