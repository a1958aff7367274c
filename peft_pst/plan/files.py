"""How large the files are that a training leaves."""

from __future__ import annotations

import json
import math

from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..layer import PSTLayer
from ..patterns import GroupsOf, Pattern, Slices
from ..patterns.shapes import Blocks
from ..sparse.codecs import TILE

Entries = dict[str, int]
"""The bytes of each tensor in a file."""


def file_bytes(entries: Entries) -> int:
    """The size of a safetensors file: the tensors, and a header that names them."""
    header, offset = {}, 0
    for name, size in entries.items():
        header[name] = {"dtype": "F32", "shape": [1024, 1024], "data_offsets": [offset, offset + size]}
        offset += size
    return 8 + len(json.dumps(header, separators=(",", ":"))) + offset


def adapter_entries(model: PeftModel) -> Entries:
    """What PEFT saves of an adapter."""
    return {
        f"base_model.model.{name}": _bytes(tensor)
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }


def dense_entries(model: PreTrainedModel) -> Entries:
    """What transformers saves of a model; tied weights once."""
    tensors = {id(tensor): (name, tensor) for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    return {name: _bytes(tensor) for name, tensor in tensors.values()}


def sparse_entries(model: PeftModel, dense: Entries, value_size: int) -> Entries:
    """What `peft_pst.save_pretrained` saves of a PST model after it was merged at the config's sparsity.

    Args:
        model: with PST layers.
        dense: what transformers saves of the model without them.
        value_size: bytes of a value that stays.
    """
    entries = dict(dense)
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, PSTLayer):
            S, P = layer.boost(layer.active_pst_adapter) or (None, None)
            boost, size = {f"{name}.boost": S, f"{name}.projection": P}, dense[f"{name}.weight"] // layer.shape.numel()
            entries |= {key: tensor.numel() * size for key, tensor in boost.items() if tensor is not None}
            smallest = _sparse_parts(layer, value_size)
            if sum(smallest.values()) < entries[f"{name}.weight"]:
                del entries[f"{name}.weight"]
                entries |= {f"{name}.sparse_{key}": size for key, size in smallest.items()}
    return entries


def _sparse_parts(layer: PSTLayer, value_size: int) -> Entries:
    """The parts of the smallest codec. 2:4 stores no less than a bitmask does, so it needs no formula of its own."""
    pattern = layer.pst_pattern[layer.active_pst_adapter]
    numel = layer.shape.numel()
    kept = numel - pattern.num_pruned(layer.shape, layer.active_config.sparsity)
    bitmask = {"bits": -(-numel // 8), "values": kept * value_size}
    tiles = {"counts": -(-numel // TILE), "indices": kept, "values": kept * value_size}
    if _fills_tiles(pattern, layer) or sum(bitmask.values()) <= sum(tiles.values()):
        return bitmask
    return tiles


def _fills_tiles(pattern: Pattern, layer: PSTLayer) -> bool:
    """Whether a tile without a zero, which its codec cannot hold, is to be expected: of units that are kept or pruned
    with equal chances, as many lie in a tile as their runs of consecutive entries leave room for."""
    rows, columns = layer.shape
    height, width = _unit(pattern, rows, columns)
    if isinstance(layer.get_base_layer(), Conv1D):  # it stores inputs by outputs
        rows, columns, height, width = columns, rows, width, height
    kept = 1 - layer.active_config.sparsity
    distinct_tiles = rows / height * max(1, columns / TILE)
    return distinct_tiles * kept ** math.ceil(TILE / width) >= 1


def _unit(pattern: Pattern, rows: int, columns: int) -> tuple[int, int]:
    """How many consecutive outputs and inputs share their fate."""
    match pattern:
        case GroupsOf():
            return 1, 1
        case Slices(dim=0):
            return rows // pattern.units // pattern.stacks, columns
        case Slices():
            return rows, columns // pattern.units // pattern.stacks
        case Blocks():
            return pattern.rows or rows, pattern.columns or columns


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
