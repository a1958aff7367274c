"""verify: whether a checkpoint is whole, tensor by tensor, without opening it as a model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from .checkpoint import INDEX
from .linear import PREFIX
from .quantizer import QUANT_METHOD, SparseCheckpointConfig, checksum
from .storage import Description, decode


def verify(folder: str | os.PathLike, against: str | os.PathLike | None = None) -> dict[str, list[str]]:
    """Read every tensor of a sparse checkpoint, check it, and decode it.

    Args:
        folder: the checkpoint.
        against: another folder, dense or sparse, whose tensors must be the same, bit for bit.

    Returns:
        For each tensor, by the name that it has in a dense file, what is wrong with it: nothing, if it is right.

    Raises:
        ValueError: if the folder holds no sparse checkpoint, or one without checksums and there is nothing to compare
            it with; its description was damaged; or a file cannot be read as safetensors, because it was cut short or
            its header is damaged.
        OSError: if a file is not there.
    """
    description = _description(folder)
    if description is None:
        raise ValueError(f"{str(folder)!r} holds no sparse checkpoint: write one with peft_pst.save_pretrained().")
    if not description.checksums and against is None:
        raise ValueError(
            f"{str(folder)!r} holds no checksums, as transformers' own save_pretrained() leaves it: save it with "
            "peft_pst.save_pretrained(), or compare it with another folder (against, --against)."
        )
    found = {name: (_identity(tensor), problems) for name, tensor, problems in _tensors(Path(folder))}
    if against is not None:
        others = {name: _identity(tensor) for name, tensor, _ in _tensors(Path(against))}
        for name in others.keys() - found.keys():
            found[name] = (None, [f"only in {against}"])
        for name, (identity, problems) in found.items():
            if identity is not None and name not in others:
                problems.append(f"not in {against}")
            elif identity is not None and identity != others[name]:
                problems.append(f"not the same as in {against}")
    return {name: problems for name, (_, problems) in found.items()}


def _identity(tensor: Tensor | None) -> tuple | None:
    """What only the same tensor has, bit for bit: whole models need not be in memory side by side."""
    if tensor is None:
        return None
    content = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return tensor.dtype, tensor.shape, hashlib.sha256(content).digest()


def _description(folder: str | os.PathLike) -> SparseCheckpointConfig | None:
    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8")).get("quantization_config", {})
    return SparseCheckpointConfig.from_dict(config) if config.get("quant_method") == QUANT_METHOD else None


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor | None, list[str]]]:
    """The tensors of a checkpoint, decoded, by the names of a dense file, and what is wrong with each."""
    description = _description(folder)
    weights, checksums = (description.weights, description.checksums) if description else ({}, {})
    names = {"model.safetensors"}
    if (folder / INDEX).is_file():
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    shards = {key: file for file in (_opened(folder / name) for name in sorted(names)) for key in file.keys()}  # noqa: SIM118
    stored = {f"{name}.{PREFIX}{part}" for name, entry in weights.items() for part in entry["parts"]}

    def read(key: str) -> Tensor:
        return shards[key].get_tensor(key)

    for key in tqdm(sorted(shards.keys() - stored), desc=folder.name, unit="tensor", disable=len(shards) < 100):
        tensor = read(key)
        yield key, tensor, _wrong(key, tensor, checksums)
    for key in sorted(checksums.keys() - shards.keys() - stored):
        yield key, None, ["missing"]
    for name, entry in tqdm(weights.items(), desc=folder.name, unit="weight", disable=len(weights) < 100):
        keys = {part: f"{name}.{PREFIX}{part}" for part in entry["parts"]}
        problems = [f"{part} is missing" for part, key in keys.items() if key not in shards]
        tensor = None
        if not problems:
            parts = {part: read(key) for part, key in keys.items()}
            problems = [problem for part, key in keys.items() for problem in _wrong(key, parts[part], checksums)]
            try:
                tensor = decode(Description(entry["codec"], entry["shape"], entry["dtype"]), parts)
            except ValueError as error:
                problems.append(str(error))
        yield f"{name}.weight", tensor, problems


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{str(file)!r} cannot be read, so it was cut short or damaged ({error}). Download or save the checkpoint "
            "again."
        ) from error


def _wrong(key: str, tensor: Tensor, checksums: dict[str, dict[str, Any]]) -> list[str]:
    expected = checksums.get(key, {}).get(str(tensor.dtype).removeprefix("torch."))
    return [] if not checksums or checksum(tensor) == expected else [f"the checksum of {key} is wrong"]
