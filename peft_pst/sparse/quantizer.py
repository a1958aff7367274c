"""transformers opens a sparse checkpoint: a quantizer that puts a SparseLinear where a weight is stored sparse."""

from __future__ import annotations

import json
import zlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from .acceleration import accelerate_opened
from .dense_product import restore_dense_layers
from .feed_forward import separate_feed_forward
from .linear import SparseLinear
from .storage import Description

QUANT_METHOD = "pst_sparse"
VERSION = 1
CHECKED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class SparseCheckpointConfig(QuantizationConfigMixin):
    """The `quantization_config` of a sparse checkpoint.

    Args:
        weights: of each stored weight, by its module: codec, shape and dtype, and dtype and shape of its parts.
        checksums: of each tensor in the file, the CRC-32 of its bytes in each dtype that it may be loaded as.
        digest: the CRC-32 of these two; None in a config that transformers writes when it saves an opened model.
        version: of the layout.

    Raises:
        ValueError: if the layout is newer than this library, or the digest is another.
    """

    def __init__(
        self,
        weights: dict[str, dict],
        checksums: dict[str, dict[str, int]],
        digest: int | None = None,
        version: int = VERSION,
        **kwargs: Any,
    ) -> None:
        if version > VERSION:
            raise ValueError(
                f"The checkpoint has version {version} of the layout {QUANT_METHOD}, but this peft-pst reads up to "
                f"{VERSION}: upgrade it with pip install -U peft-pst."
            )
        if digest is not None and digest != digest_of(weights, checksums):
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
        modules = dict(model.named_modules())
        for name, entry in self.quantization_config.weights.items():
            name = next((spelling for spelling in _spellings(model, name) if spelling in modules), None)
            if name is None:
                continue  # a head that this model class has not
            parent, _, child = name.rpartition(".")
            linear = model.get_submodule(name)
            description = Description(entry["codec"], entry["shape"], entry["dtype"])
            parts = {
                part: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
                for part, (dtype, shape) in entry["parts"].items()
            }
            sparse = SparseLinear(description, parts, linear.bias, conv1d=not isinstance(linear, nn.Linear))
            setattr(model.get_submodule(parent), child, sparse.train(linear.training))
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
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
            dtype = str(tensor.dtype).removeprefix("torch.")
            if tensor.is_floating_point() and "float32" in checksums and dtype not in checksums:
                continue  # a cast that no checksum foresees
            if checksums.get(dtype) != checksum(tensor):
                raise ValueError(
                    f"The tensor {key!r} is not the one that was saved: its checksum is wrong, so the file was "
                    "damaged on a disk or on the way. Download or save the checkpoint again."
                )
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
        """Whether the stored weights train."""
        return False


def densify(model: nn.Module) -> nn.Module:
    """Replace every `SparseLinear` of a model by the dense layer, in place: it is an ordinary model again."""
    opened_sparse = isinstance(getattr(model, "hf_quantizer", None), SparseCheckpointQuantizer)
    return model.dequantize() if opened_sparse else _with_dense_layers(model)


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


def checksums_of(tensor: Tensor) -> dict[str, int]:
    """The checksum of a tensor as it is, and of what a cast at loading would make of it."""
    dtypes = {tensor.dtype, *CHECKED_DTYPES} if tensor.is_floating_point() else {tensor.dtype}
    return {str(dtype).removeprefix("torch."): checksum(tensor.to(dtype)) for dtype in sorted(dtypes, key=str)}


def digest_of(weights: dict[str, dict], checksums: dict[str, dict[str, int]]) -> int:
    """The CRC-32 of what describes a checkpoint, as JSON without spaces and with sorted keys."""
    return zlib.crc32(json.dumps([weights, checksums], sort_keys=True, separators=(",", ":")).encode())


def _spellings(model: nn.Module, name: str) -> tuple[str, str, str]:
    """A name in a checkpoint of a model with a head, and of one without."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return name, name.removeprefix(prefix), prefix + name


def register() -> None:
    """Make the layout known to transformers' `from_pretrained`. Calling it again changes nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(SparseCheckpointConfig)
        register_quantizer(QUANT_METHOD)(SparseCheckpointQuantizer)
