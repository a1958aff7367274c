"""An exported model in OpenVINO, and what each of its layers runs on."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from numpy.typing import ArrayLike
from torch import Tensor

from peft_pst.report import format_table

from .calls import FILE, example, imported, run

if TYPE_CHECKING:
    import openvino

TILE = 64
"""The sizes of a weight that the sparse kernels take are multiples of this."""


@dataclass(frozen=True)
class Layer:
    """A product with a constant weight, and how the compiled model takes it.

    Attributes:
        name: of the module in the exported model.
        shape: of the weight as stored; [out, in] in what is exported here.
        sparsity: share of zeros in the weight.
        kernel: what runs, as OpenVINO calls it, such as `brgemm_avx512_amx_sparse_I8`; empty if it does not say.
        obstacle: what about the layer keeps it from the sparse kernels, empty if nothing does. The processor is not
            asked.
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float
    kernel: str
    obstacle: str

    @property
    def is_sparse(self) -> bool:
        return "sparse" in self.kernel


class OpenVINOModel:
    """A compiled model. Called with `input_ids` and `attention_mask`, int64 [batch, tokens], tensors or arrays, it
    returns the logits or the last hidden state, a tensor in fp32. One thread may call it at a time.

    Attributes:
        layers (`list[Layer]`): its linear layers, in their order.
    """

    def __init__(self, compiled: openvino.CompiledModel, layers: list[Layer]) -> None:
        self._compiled = compiled
        self.layers = layers

    def __call__(self, input_ids: ArrayLike | Tensor, attention_mask: ArrayLike | Tensor) -> Tensor:
        return run(self._compiled, {"input_ids": input_ids, "attention_mask": attention_mask})

    def table(self) -> str:
        """What each layer runs on, in Markdown."""
        rows = [
            (layer.name, "x".join(map(str, layer.shape)), f"{layer.sparsity:.1%}", layer.kernel, layer.obstacle)
            for layer in self.layers
        ]
        return format_table(("layer", "weight", "zeros", "kernel", "why it cannot be sparse"), rows)


def open_openvino(
    folder: str | os.PathLike, *, sparse_rate: float = 0.75, threads: int | None = None
) -> OpenVINOModel:
    """Compile an exported model for this machine's CPU.

    A warning says, with the reason, if a layer that should run on the sparse kernels does not. If these would crash at
    one of its weights, the whole model runs dense, with a warning. What OpenVINO would compute in bf16 is computed in
    fp32.

    Args:
        folder: what `export_openvino` has written.
        sparse_rate: share of zeros, 0..1, from which a weight is kept compressed; 1 is never. A weight pruned to
            80 % may hold an entry fewer, so leave some room.
        threads: how many, at most. By default OpenVINO takes all cores.

    Raises:
        ImportError: if OpenVINO is not installed.
        ValueError: if the folder holds no exported model, or an argument is out of range.
    """
    ov = imported("openvino")
    file = Path(folder, FILE)
    if not file.is_file():
        raise ValueError(f"{os.fspath(folder)!r} holds no {FILE}: expected a folder that export_openvino has written.")
    if not 0 <= sparse_rate <= 1:
        raise ValueError(f"sparse_rate={sparse_rate!r} is a share of zeros: expected a number from 0 to 1.")
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads!r}: expected at least 1.")
    options = {
        ov.properties.intel_cpu.sparse_weights_decompression_rate(): sparse_rate,
        ov.properties.hint.inference_precision(): ov.Type.f32,
    }
    if threads is not None:
        options[ov.properties.inference_num_threads()] = threads
    core = ov.Core()
    model = core.read_model(file)
    if has_amx() and (crashing := _crashing(model, sparse_rate)):
        warnings.warn(
            f"The model runs dense in OpenVINO: its sparse kernels crash at {TILE}x{TILE}, the sizes of {crashing[0]} "
            f"({len(crashing)} layers in all). Prune these less than {sparse_rate:.0%}, or say sparse_rate=1 if dense "
            "is what you want.",
            stacklevel=2,
        )
        sparse_rate = options[ov.properties.intel_cpu.sparse_weights_decompression_rate()] = 1
    compiled = core.compile_model(model, "CPU", options)
    run(compiled, example(1, 16))  # the kernels are chosen at the first run
    opened = OpenVINOModel(compiled, list(_layers(model, compiled, sparse_rate)))
    _warn_of_dense_layers(opened.layers, sparse_rate)
    return opened


def has_amx() -> bool:
    """Whether this processor has AMX for int8, which OpenVINO's sparse kernels need. Linux only, as they are used."""
    try:
        return "amx_int8" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def _layers(model: openvino.Model, compiled: openvino.CompiledModel, sparse_rate: float) -> Iterator[Layer]:
    """The products of a model with a constant, each beside the node of the compiled model that has the same one."""
    running = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        if node.get_rt_info()["layerType"].astype(str) == "FullyConnected":
            running[node.input_value(1).get_node().get_friendly_name()] = node
    for product in model.get_ordered_ops():
        weight = _weight(product) if product.get_type_name() == "MatMul" else None
        if weight is None:
            continue
        node = running.get(weight.get_friendly_name())
        shape = tuple(weight.get_output_shape(0))
        sparsity = float((weight.data == 0).mean())
        kernel = "" if node is None else node.get_rt_info()["primitiveType"].astype(str)
        obstacle = _obstacle(product, weight, sparsity, sparse_rate)
        obstacle = obstacle or _obstacle_at_work(node)
        yield Layer(_module_name(product.get_friendly_name()), shape, sparsity, kernel, obstacle)


def _crashing(model: openvino.Model, sparse_rate: float) -> list[str]:
    """The layers that end the process where 16 tokens or fewer come in (OpenVINO 2026.4)."""
    weights = {p: _weight(p) for p in model.get_ordered_ops() if p.get_type_name() == "MatMul"}
    return [
        _module_name(product.get_friendly_name())
        for product, weight in weights.items()
        if weight is not None
        and tuple(weight.get_output_shape(0)) == (TILE, TILE)
        and not _obstacle(product, weight, float((weight.data == 0).mean()), sparse_rate)
    ]


def _weight(product: openvino.Node) -> openvino.Node | None:
    """The constant that a product takes as its second factor, behind what turns int8 into numbers."""
    node = product.input_value(1).get_node()
    while node.get_type_name() in ("Multiply", "Subtract", "Convert"):
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" else None


def _obstacle(product: openvino.Node, weight: openvino.Node, sparsity: float, sparse_rate: float) -> str:
    dtype, shape = weight.get_element_type().get_type_name(), tuple(weight.get_output_shape(0))
    if dtype != "i8":
        return f"its weight is {dtype}, not int8"
    if len(shape) != 2:
        return f"its weight has {len(shape)} dimensions, not 2"
    if not product.get_attributes()["transpose_b"]:
        return "its weight is stored [in, out], not [out, in]"
    if any(size % TILE for size in shape):
        return f"its sizes are not both divisible by {TILE}"
    if sparse_rate == 1:
        return "sparse_rate is 1"
    return f"fewer than {sparse_rate:.0%} of its weight are zeros" if sparsity < sparse_rate else ""


def _obstacle_at_work(node: openvino.Node | None) -> str:
    if node is None:
        return "it is no linear layer in the compiled model"
    source = node.input_value(0)
    dtype = source.get_node().get_rt_info()["outputPrecisions"].astype(str).split(",")[source.get_index()]
    return "" if dtype in ("i8", "u8") else f"its input is {dtype}, not int8"


def _module_name(name: str) -> str:
    """`bert.pooler.dense` of `__module.model.bert.pooler.dense/aten::linear/MatMul`."""
    return name.partition("/")[0].removeprefix("__module.model.")


def _warn_of_dense_layers(layers: list[Layer], sparse_rate: float) -> None:
    """Say what keeps the layers with many zeros from the sparse kernels."""
    if sparse_rate == 1:
        return
    pruned = [layer for layer in layers if layer.sparsity >= sparse_rate]
    if not pruned:
        most = max((layer.sparsity for layer in layers), default=0.0)
        warnings.warn(
            f"The model runs dense in OpenVINO: no weight has {sparse_rate:.0%} zeros, the most is {most:.1%}. Lower "
            "sparse_rate, or say sparse_rate=1 if dense is what you want.",
            stacklevel=3,
        )
        return
    default = "OpenVINO has chosen another kernel" if has_amx() else "this processor has no AMX"
    reasons = Counter(layer.obstacle or default for layer in pruned if not layer.is_sparse)
    if reasons:
        listed = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
        warnings.warn(
            f"{reasons.total()} of {len(pruned)} layers with at least {sparse_rate:.0%} zeros run dense in OpenVINO: "
            f"{listed}. Its sparse kernels need AMX (Intel Xeon from the 4th generation on), int8 (export with texts) "
            f"and sizes divisible by {TILE}. Say sparse_rate=1 if dense is what you want.",
            stacklevel=3,
        )
