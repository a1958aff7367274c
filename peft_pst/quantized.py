"""Weights that bitsandbytes or torchao hold in 8 or 4 bits: how they are read, and what a merge replaces them by."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.utils import resolve_quantization_backend
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LIBRARIES = ("bitsandbytes", "torchao")


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose weight is one of bitsandbytes or torchao."""
    return isinstance(module, nn.Linear) and _is_theirs(module.weight)


def _is_theirs(tensor: Tensor) -> bool:
    return type(tensor).__module__.partition(".")[0] in LIBRARIES


def backend_of(layer: nn.Module) -> QuantizationBackend | None:
    """What reads the weight of a linear layer; None if that is a plain tensor."""
    if not is_quantized(layer):
        return None
    # PEFT wants the function only to quantize again, which PST never does
    return resolve_quantization_backend(layer, get_apply_tensor_subclass=type(None))


def check_quantized(layer: nn.Linear, key: str) -> None:
    """Raise TypeError if PST cannot train over the quantized weight of a target module."""
    backend = backend_of(layer)
    weight = layer.weight
    what = f"The target module {key!r} is a {type(layer).__name__} with a {type(weight).__name__}"
    if backend is None:
        raise TypeError(f"{what}, which PEFT does not read: load the model with load_in_8bit or load_in_4bit.")
    bits = {"Int8Params": weight.dtype == torch.int8, "Params4bit": getattr(weight, "quant_state", None) is not None}
    if not bits.get(type(weight).__name__, True):
        raise TypeError(
            f"{what} of {weight.dtype}, which is not quantized yet: move the model to its device before, and load it "
            "without llm_int8_has_fp16_weight=True, which quantizes anew in each forward."
        )
    if getattr(weight, "act_quant_kwargs", None) is not None:
        raise TypeError(
            f"{what} that quantizes activations too: its kernel has no gradient, so what comes before a layer without "
            "an adapter would silently train wrongly. Quantize weights only, such as with Int8WeightOnlyConfig."
        )
    try:
        read(layer, backend)
    except NotImplementedError as error:
        raise TypeError(
            f"{what}, which torchao cannot dequantize, but PST needs the weight in each step: choose another "
            "quantization, such as Int8WeightOnlyConfig."
        ) from error


@torch.no_grad()
def read(layer: nn.Linear, backend: QuantizationBackend) -> Tensor:
    """The weight of a quantized layer as a dense copy, [out, in], in the dtype that the library gives."""
    state = getattr(layer.weight, "quant_state", None)
    if state is not None and layer.weight.device.type == "cpu":
        # bitsandbytes 0.50 reorders a 4-bit weight for its CPU kernel in evaluation, and cannot read it then
        if getattr(state, "packing_format_for_cpu", False):
            layer.state_dict()  # saving puts it back,
            state = layer.weight.quant_state
        if state.absmax.ndim == 2:  # but the scales only if they are quantized too
            state.absmax = state.absmax.T.reshape(-1).float()
    return backend.get_base_weight(layer)


@contextmanager
def kept_in_order(layer: nn.Module) -> Iterator[None]:
    """Run a layer's own forward without the CPU kernel that reorders its 4-bit weight and rounds its scales."""
    reorders = getattr(layer, "support_avx512bf16_for_cpu", False)
    if reorders:
        layer.support_avx512bf16_for_cpu = False
    try:
        yield
    finally:
        if reorders:
            layer.support_avx512bf16_for_cpu = True


def stored(weight: Tensor) -> list[Tensor]:
    """The plain tensors that hold a weight."""
    names = weight.__tensor_flatten__()[0] if hasattr(weight, "__tensor_flatten__") else []
    return [getattr(weight, name) for name in names] or [weight]


def compute_dtype(layer: nn.Module, x: Tensor) -> torch.dtype:
    """The dtype in which a layer multiplies an input outside autocast."""
    if layer.weight.dtype.is_floating_point and not hasattr(layer.weight, "quant_state"):
        return layer.weight.dtype
    return getattr(layer, "compute_dtype", None) or x.dtype


def dense_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of what a model does not quantize, the adapters left out: that of its activations."""
    parameters = (p for name, p in model.named_parameters() if ".pst_" not in name and not _is_theirs(p))
    return next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)


def dense_layer(layer: nn.Linear, weight: Tensor, dtype: torch.dtype) -> nn.Linear | Conv1D:
    """An ordinary layer in the place of a quantized one, of the class that the model had there.

    Args:
        layer: the quantized layer, whose bias it takes.
        weight: [out, in].
        dtype: of the weight and of the bias.
    """
    conv1d = issubclass(getattr(layer, "source_cls", nn.Linear), Conv1D)
    with torch.device("meta"):
        dense = Conv1D(*weight.shape) if conv1d else nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    weight = (weight.T if conv1d else weight).to(dtype).contiguous()
    dense.weight, dense.bias = nn.Parameter(weight, requires_grad=False), layer.bias
    if dense.bias is not None:
        dense.bias.data = dense.bias.data.to(dtype)
    return dense.train(layer.training)


def make_dense(model: nn.Module) -> None:
    """Dequantize what is still quantized in a merged model, so that it is an ordinary one.

    Warns if there is such a layer: it takes more memory from then on, but a model that is stored sparse has no place
    for quantized weights.
    """
    dtype = dense_dtype(model)
    layers = {name: module for name, module in model.named_modules() if is_quantized(module)}
    for name, layer in layers.items():
        parent, _, own_name = name.rpartition(".")
        dense = dense_layer(layer, read(layer, backend_of(layer)), dtype)
        setattr(model.get_submodule(parent), own_name, dense)
    if layers:
        warnings.warn(
            f"{len(layers)} quantized layers without an adapter, such as {next(iter(layers))}, are dequantized too: "
            "a merged model is an ordinary one, which save_pretrained() stores.",
            stacklevel=4,
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.quant_method in LIBRARIES:
        quantizer.remove_quantization_config(model)
        model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
