"""save_pretrained: a sparse model as a folder that transformers opens."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..merged import check_merged
from ..sharded import gathered, is_sharded
from .files import replacing
from .linear import PREFIX, SparseLinear
from .quantizer import QUANT_METHOD, VERSION, boosts_of, checksums_of, densify, digest_of, widths_in
from .storage import Description, Values, encode

INDEX = "model.safetensors.index.json"
REPLACED = re.compile(
    r"(config|generation_config)\.json|(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
)
"""The files of a model, which a save replaces; everything else in the folder stays."""


def save_pretrained(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    format: Literal["auto", "dense"] = "auto",
    *,
    values: Values = "exact",
    tokenizer: Any = None,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Save a merged model so that its zeros take no space; with `import peft_pst`, `from_pretrained` opens it.

    The folder is written beside its place and then exchanged with what is there: it holds the old model or the new
    one, whatever happens. Files of other names stay in it. Only where a folder cannot be exchanged, as a mount point
    or the current directory, its files are replaced one by one.

    A model that FSDP2 or ZeRO-3 spreads over processes is gathered, a tensor at a time, and written by the first of
    them: all processes call this, and each returns when the folder is there.

    Args:
        model (`PreTrainedModel`):
            The model, after `merge_and_unload()`.
        folder (`str` or `os.PathLike`):
            Where to.
        format (`str`):
            `"auto"` stores each weight of a linear layer in the fewest bytes. `"dense"` stores zeros like any value,
            for tools that know nothing of us; it has no place for low-rank boosts.
        values (`str`):
            `"exact"`, or `"bf16"`, `"fp16"`, `"int8"` to round the values of the linear layers that are stored sparse.
        tokenizer (*optional*):
            A tokenizer or processor to save beside the model.
        max_shard_size (`int`):
            Bytes of a file, after which the next one begins.

    Raises:
        TypeError: if it is no model of transformers, or its weights are quantized.
        ValueError: if an adapter is not merged yet, the model is not all in memory, the format is unknown or has no
            place for the model's boosts, or the folder is that of an adapter.
    """
    _check(model, format)
    sharded = any(is_sharded(tensor) for tensor in model.state_dict(keep_vars=True).values())
    if sharded and torch.distributed.get_rank() != 0:
        for _, _, tensor in _entries(model):
            gathered(tensor)
        torch.distributed.barrier()
        return
    if Path(folder, "adapter_config.json").exists():
        raise ValueError(
            f"{os.fspath(folder)!r} holds an adapter, which transformers would open instead of the model: save the "
            "model into a folder of its own."
        )
    with replacing(Path(folder), lambda name: REPLACED.fullmatch(name) is not None) as written:
        if format == "dense" or values != "exact":
            model = densify(copy.deepcopy(model)) if _has_sparse_layers(model) else model
        if format == "dense":
            whole = {name: gathered(tensor).detach().cpu() for name, _, tensor in _entries(model)} if sharded else None
            model.save_pretrained(written, max_shard_size=max_shard_size, state_dict=whole)
        else:
            _write(model, written, values, max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(written)
    if sharded:
        torch.distributed.barrier()


def _check(model: nn.Module, format: str) -> None:
    if format not in ("auto", "dense"):
        raise ValueError(f"format={format!r} is unknown: expected 'auto' or 'dense'.")
    check_merged(model, "save")
    boosted = next(iter(boosts_of(model)), None)
    if format == "dense" and boosted is not None:
        raise ValueError(
            f"The model has low-rank boosts, such as that of {boosted!r}, and format='dense' has no place for them: "
            "save it with format='auto', which opens after `import peft_pst`, or train it with PSTConfig(boost=None)."
        )


def _has_sparse_layers(model: PreTrainedModel) -> bool:
    return any(isinstance(module, SparseLinear) for module in model.modules())


def _write(model: PreTrainedModel, folder: Path, values: Values, max_shard_size: int) -> None:
    weights: dict[str, dict] = {}
    checksums: dict[str, dict[str, Any]] = {}
    (widths, biases), boosts = widths_in(model.config), boosts_of(model)
    # one weight of another size than the config says is stored as it is: a reader that ignores the entry fails at it
    as_it_is = next(iter(widths), None)
    if as_it_is and isinstance(model.get_submodule(as_it_is), SparseLinear):
        model = copy.deepcopy(model)
        parent, _, child = as_it_is.rpartition(".")
        setattr(model.get_submodule(parent), child, model.get_submodule(as_it_is).to_linear())
    shards: list[dict[str, int]] = []  # the tensors of each file and their bytes
    shard: dict[str, Tensor] = {}
    size, written = 0, set()  # of the shard, bytes and where its tensors are

    def flush() -> None:
        save_file(shard, folder / f"shard{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append({key: _bytes(tensor) for key, tensor in shard.items()})
        shard.clear()

    entries = list(_entries(model))
    for name, module, tensor in tqdm(
        entries, desc="saving", unit="tensor", disable=None if len(entries) > 100 else True
    ):
        whole = name == f"{as_it_is}.weight"
        tensor = gathered(tensor)
        parts = {name: tensor} if whole else _parts(name, module, tensor, values, weights)
        for key, part in parts.items():
            if shard and size + _bytes(part) > max_shard_size:
                flush()
                size, written = 0, set()
            size += _bytes(part)
            checksums[key] = checksums_of(part)
            shard[key] = part.detach().cpu().contiguous()
            if shard[key].data_ptr() in written:
                shard[key] = shard[key].clone()  # shared by hand: safetensors takes no memory twice
            written.add(shard[key].data_ptr())
    flush()
    _name_shards(folder, shards)
    config = copy.deepcopy(model.config)
    if weights and widths:
        config.pruned_heads = {}  # by them transformers 4 would open it, and give stored weights random values
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    config.quantization_config = {
        "quant_method": QUANT_METHOD,
        "version": VERSION,
        "digest": digest_of(weights, checksums, widths, biases, boosts),
        "weights": weights,
        "checksums": checksums,
        **({"widths": widths, "biases": biases} if widths else {}),
        **({"boosts": boosts} if boosts else {}),
    }
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _entries(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Name, module and value of each tensor of the state dict; of those that the model ties the first."""
    tied, first = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        # the same in all processes
        key = id(tensor) if is_sharded(tensor) else (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        earlier = first.setdefault(key, name)
        if earlier != name:
            tied = tied or _tied(model)
            if name in tied and tied[name] == tied.get(earlier):
                continue
        yield name, model.get_submodule(name.rpartition(".")[0]), tensor


def _tied(model: PreTrainedModel) -> dict[str, int]:
    """Which tensor each name has in a new model of the same class and config: those that it ties have the same, those
    that were shared by hand have not."""
    config = copy.deepcopy(model.config)
    if getattr(config, "pruned_heads", None):
        config.pruned_heads = {}  # transformers 4 prunes by values, which the meta device has not
    with torch.device("meta"):
        new = type(model)(config)
    new.tie_weights()
    return {name: id(tensor) for name, tensor in new.state_dict(keep_vars=True).items()}


def _parts(
    name: str, module: nn.Module, tensor: Tensor, values: Values, weights: dict[str, dict]
) -> dict[str, Tensor]:
    """The entries of the file for one tensor of the state dict; describes in `weights` what is stored."""
    path, _, own = name.rpartition(".")
    if isinstance(module, SparseLinear) and own.startswith(PREFIX):
        entry = weights.setdefault(path, _described(module.description))
        entry["parts"][own.removeprefix(PREFIX)] = _part(tensor)
    elif type(module) in (nn.Linear, Conv1D) and own == "weight":  # a class of its own has a forward of its own
        description, parts = encode(tensor, values)
        if description.codec != "dense" or (values == "exact" and _bytes(parts["values"]) < _bytes(tensor)):
            weights[path] = {**_described(description), "parts": {k: _part(part) for k, part in parts.items()}}
            return {f"{path}.{PREFIX}{key}": part for key, part in parts.items()}
    return {name: tensor}


def _described(description: Description) -> dict[str, Any]:
    return {**description._asdict(), "parts": {}}


def _part(part: Tensor) -> list:
    return [str(part.dtype).removeprefix("torch."), list(part.shape)]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _name_shards(folder: Path, shards: list[dict[str, int]]) -> None:
    """Give the files the names that transformers looks for, and write the index if there are several."""
    if len(shards) == 1:
        os.replace(folder / "shard0.safetensors", folder / "model.safetensors")
        return
    weight_map = {}
    for i, sizes in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / f"shard{i}.safetensors", folder / file)
        weight_map |= dict.fromkeys(sizes, file)
    total = sum(sum(sizes.values()) for sizes in shards)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))
