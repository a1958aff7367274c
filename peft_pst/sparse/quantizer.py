"""transformers opens a sparse checkpoint: a quantizer that puts a SparseLinear where a weight is stored sparse."""

from __future__ import annotations

import json
import zlib
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..boost import Boosted
from ..sharded import whole_shape
from ..structured.widths import find_structures, set_widths
from .acceleration import accelerate_opened
from .dense_product import restore_dense_layers
from .feed_forward import separate_feed_forward
from .linear import PREFIX, SparseLinear
from .storage import Description

QUANT_METHOD = "pst_sparse"
VERSION = 1
CHECKED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class SparseCheckpointConfig(QuantizationConfigMixin):
    """The `quantization_config` of a sparse checkpoint.

    Args:
        weights: of each stored weight, by its module: codec, shape and dtype, and dtype and shape of its parts.
        checksums: of each tensor in the file, the CRC-32 of its bytes in each dtype that it may be loaded as, and, but
            in older checkpoints, its shape.
        widths: how many neurons or heads a structure has that `shrink` made smaller than the rest of the config says,
            by its first layer.
        biases: linear layers that have a bias, unlike those of the architecture.
        boosts: of each layer with a low-rank boost, by its name, the shapes of `boost` and perhaps `projection`.
        digest: the CRC-32 of all these; None in a config that transformers writes when it saves an opened model.
        version: of the layout.

    Raises:
        ValueError: if the layout is newer than this library, or the digest is another.
    """

    def __init__(
        self,
        weights: dict[str, dict],
        checksums: dict[str, dict[str, Any]],
        digest: int | None = None,
        version: int = VERSION,
        widths: dict[str, int] | None = None,
        biases: list[str] | None = None,
        boosts: dict[str, dict[str, list[int]]] | None = None,
        **kwargs: Any,
    ) -> None:
        if version > VERSION:
            raise ValueError(
                f"The checkpoint has version {version} of the layout {QUANT_METHOD}, but this peft-pst reads up to "
                f"{VERSION}: upgrade it with pip install -U peft-pst."
            )
        self.widths, self.biases, self.boosts = widths or {}, biases or [], boosts or {}
        if digest is not None and digest != digest_of(weights, checksums, self.widths, self.biases, self.boosts):
            raise ValueError(
                "The quantization_config in config.json is not the one that was saved: its digest is wrong, so the "
                "file was damaged or edited. Download or save the checkpoint again."
            )
        self.quant_method, self.version = QUANT_METHOD, version
        self.weights, self.checksums, self.digest = weights, checksums, digest


class SparseCheckpointQuantizer(HfQuantizer):
    """Makes the modules that hold a checkpoint's stored weights, and checks what was loaded into them."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        model.config.quantization_config = self.quantization_config  # transformers 4.57 has a copy there
        _resize(model, self.quantization_config)
        _add_boosts(model, self.quantization_config.boosts)
        modules, self._new = dict(model.named_modules()), {}
        for key, entry in self.quantization_config.weights.items():
            name = next((spelling for spelling in _spellings(model, key) if spelling in modules), None)
            if name is None:
                continue  # a head that this model class has not
            parent, _, child = name.rpartition(".")
            linear = model.get_submodule(name)
            if type(linear).forward not in (nn.Linear.forward, Conv1D.forward):
                raise ValueError(
                    f"The checkpoint stores the weight of {name!r} sparse, but that is a {type(linear).__name__} "
                    "here, with a forward of its own: expected torch.nn.Linear or transformers' Conv1D. Save the "
                    "model again with this peft-pst, which stores such a weight as it is."
                )
            description = Description(entry["codec"], entry["shape"], entry["dtype"])
            parts = {
                part: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
                for part, (dtype, shape) in entry["parts"].items()
            }
            if list(whole_shape(linear.weight)) != entry["shape"]:
                # a new head: transformers finds parts of another size too, and raises or was told to ignore that
                for part, tensor in parts.items():
                    linear.register_buffer(PREFIX + part, tensor.new_empty(*tensor.shape, 0))
                self._new[key] = linear, parts
                continue
            sparse = SparseLinear(description, parts, linear.bias, conv1d=isinstance(linear, Conv1D))
            setattr(model.get_submodule(parent), child, sparse.train(linear.training))
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for linear, parts in self._new.values():
            for part in parts:
                delattr(linear, PREFIX + part)
        state = dict(model.state_dict())
        offloads = len(set(getattr(model, "hf_device_map", {}).values())) > 1  # to another device's memory, or a disk
        for key, checksums in self.quantization_config.checksums.items():
            name = next((n for n in _spellings(model, key) if n in state), None)
            if name is None or (state[name].is_meta and offloads):
                continue
            if state[name].is_meta:
                raise ValueError(
                    f"The tensor {key!r} is not in the file that should hold it: the file was damaged on a disk or on "
                    "the way. Download or save the checkpoint again."
                )
            tensor = state[name]
            if list(tensor.shape) != checksums.get("shape", list(tensor.shape)):
                continue  # of a new head: transformers says so
            dtype = str(tensor.dtype).removeprefix("torch.")
            if tensor.is_floating_point() and "float32" in checksums and dtype not in checksums:
                continue  # a cast that no checksum foresees
            if checksums.get(dtype) != checksum(tensor):
                raise ValueError(
                    f"The tensor {key!r} is not the one that was saved: its checksum is wrong, so the file was "
                    "damaged on a disk or on the way. Download or save the checkpoint again."
                )
        stored = self.quantization_config.weights
        self.quantization_config.weights = {key: entry for key, entry in stored.items() if key not in self._new}
        self._new = {}
        # a model that goes on changing has others
        self.quantization_config.checksums, self.quantization_config.digest = {}, None
        accelerate_opened(model)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return _with_dense_layers(model)

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """Whether transformers may save the model again: the parts are buffers like any other."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether all weights train: those that are stored sparse do not."""
        return not self.quantization_config.weights


def densify(model: nn.Module) -> nn.Module:
    """Replace every `SparseLinear` of a model by the dense layer, in place: it is an ordinary model again, but for its
    low-rank boosts, which stay."""
    if not isinstance(getattr(model, "hf_quantizer", None), SparseCheckpointQuantizer):
        return _with_dense_layers(model)
    widths, biases = widths_in(model.config)
    model = model.dequantize()
    if widths:  # the model still has them
        model.config.quantization_config = SparseCheckpointConfig({}, {}, widths=widths, biases=biases)
    describe_boosts(model)
    return model


def _with_dense_layers(model: nn.Module) -> nn.Module:
    separate_feed_forward(model)
    restore_dense_layers(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseLinear):
            parent, _, child = name.rpartition(".")
            # a model may be opened in another dtype than it was stored in
            dtype = getattr(model, "dtype", None) if module.bias is None else module.bias.dtype
            setattr(model.get_submodule(parent), child, module.to_linear(dtype).train(module.training))
    return model


def checksum(tensor: Tensor) -> int:
    """The CRC-32 of the bytes of a tensor in row-major order."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return zlib.crc32(flat.view(torch.uint8).numpy() if flat.numel() else b"")


def checksums_of(tensor: Tensor) -> dict[str, Any]:
    """The checksum of a tensor as it is, and of what a cast at loading would make of it; and its shape."""
    dtypes = {tensor.dtype, *CHECKED_DTYPES} if tensor.is_floating_point() else {tensor.dtype}
    checksums = {str(dtype).removeprefix("torch."): checksum(tensor.to(dtype)) for dtype in sorted(dtypes, key=str)}
    return {**checksums, "shape": list(tensor.shape)}


def digest_of(
    weights: dict[str, dict],
    checksums: dict[str, dict[str, Any]],
    widths: dict[str, int],
    biases: list[str],
    boosts: dict[str, dict[str, list[int]]],
) -> int:
    """The CRC-32 of what describes a checkpoint, as JSON without spaces and with sorted keys."""
    described = [weights, checksums, *([widths, biases] if widths else []), *([boosts] if boosts else [])]
    return zlib.crc32(json.dumps(described, sort_keys=True, separators=(",", ":")).encode())


def widths_in(config: PretrainedConfig) -> tuple[dict[str, int], list[str]]:
    """The widths and biases of a model that no config of its architecture can say; empty for most models."""
    entry = getattr(config, "quantization_config", None)
    return (entry.widths, entry.biases) if isinstance(entry, SparseCheckpointConfig) else ({}, [])


def boosts_of(model: nn.Module) -> dict[str, dict[str, list[int]]]:
    """The low-rank boosts of a model as `SparseCheckpointConfig` has them."""
    return {
        name: {key: list(p.shape) for key, p in module.named_parameters(recurse=False)}
        for name, module in model.named_modules()
        if isinstance(module, Boosted)
    }


def describe_boosts(model: nn.Module) -> None:
    """Give the config of a merged model the entry with which transformers' own save keeps its boosts."""
    boosts = boosts_of(model)
    if boosts and isinstance(getattr(model, "config", None), PretrainedConfig):
        widths, biases = widths_in(model.config)
        model.config.quantization_config = SparseCheckpointConfig({}, {}, widths=widths, biases=biases, boosts=boosts)


def _add_boosts(model: nn.Module, boosts: dict[str, dict[str, list[int]]]) -> None:
    """Put the boosts of a checkpoint beside the layers of a new model; they wait on the meta device."""
    modules = dict(model.named_modules())
    for name in sorted(boosts):  # a layer before what lies in it: one that was boosted twice
        own_name = next((spelling for spelling in _spellings(model, name) if spelling in modules), None)
        if own_name is None:
            continue  # a head that this model class has not
        linear, (parent, _, child) = modules[own_name], own_name.rpartition(".")
        dtype = linear.weight.dtype
        tensors = {key: torch.empty(shape, dtype=dtype, device="meta") for key, shape in boosts[name].items()}
        layer = Boosted(linear, **tensors).requires_grad_()  # as all parameters of a model that is opened
        setattr(modules[parent], child, layer.train(linear.training))
        modules |= {own_name: layer, f"{own_name}.linear": linear}


def _resize(model: nn.Module, entry: SparseCheckpointConfig) -> None:
    """Give a new model the widths of the checkpoint; the entry goes on with the names that its class has."""
    if not entry.widths:
        return
    structures, modules = find_structures(model), dict(model.named_modules())

    def spelled(name: str, known: Container[str]) -> str | None:
        return next((spelling for spelling in _spellings(model, name) if spelling in known), None)

    widths = {spelled(name, structures): kept for name, kept in entry.widths.items()}
    biases = [spelled(name, modules) for name in entry.biases]
    # None is a layer that this model class has not
    entry.widths = {name: kept for name, kept in widths.items() if name is not None}
    entry.biases = [name for name in biases if name is not None]
    set_widths(model, entry.widths, entry.biases)


def _spellings(model: nn.Module, name: str) -> tuple[str, str, str]:
    """A name in a checkpoint of a model with a head, and of one without."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return name, name.removeprefix(prefix), prefix + name


def register() -> None:
    """Make the layout known to transformers' `from_pretrained`. Calling it again changes nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(SparseCheckpointConfig)
        register_quantizer(QUANT_METHOD)(SparseCheckpointQuantizer)
