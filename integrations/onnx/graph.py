"""ONNX files: their weights as arrays, stored so that zeros take no space, and quantized."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, SparseTensorProto, TensorProto, numpy_helper
from onnx.external_data_helper import set_external_data
from onnxruntime import SessionOptions

ONE_FILE = 2**31 - 2**26
"""Bytes of tensors, from which they go into a second file, `<name>_data`, as optimum names it: protobuf holds 2 GB."""

EXTERNAL = 1024
"""Bytes of a tensor from which it goes into the second file."""

VALUES = (TensorProto.FLOAT, TensorProto.INT8, TensorProto.UINT8)
"""What weights are of: other tensors hold shapes and positions, which a graph needs when it is opened."""


def weights(file: Path) -> dict[str, np.ndarray]:
    """Every initializer with two dimensions or more, dense, by its name; a quantized one by the name that it had
    before, as steps from its zero point (int16)."""
    model = onnx.load(file, load_external_data=False)
    found = {}
    for tensor in (tensor for graph in _graphs(model.graph) for tensor in graph.initializer):
        found[tensor.name] = numpy_helper.to_array(tensor, str(file.parent))
    for tensor in (tensor for graph in _graphs(model.graph) for tensor in graph.sparse_initializer):
        array = np.zeros(tuple(tensor.dims), onnx.helper.tensor_dtype_to_np_dtype(tensor.values.data_type))
        indices = numpy_helper.to_array(tensor.indices, str(file.parent))
        array.flat[indices] = numpy_helper.to_array(tensor.values, str(file.parent))
        found[tensor.values.name] = array
    for name in [name for name in found if name.endswith("_quantized")]:
        before = name.removesuffix("_quantized")
        found[before] = found.pop(name) - found[f"{before}_zero_point"].astype(np.int16)
    return {name: array for name, array in found.items() if array.ndim > 1}


def write(model: ModelProto, file: Path) -> None:
    """Write a graph, with its tensors in a file beside it if they are too large for one."""
    for part in file.parent.glob(f"{file.name}?*"):  # optimum's model.onnx_data, torch's model.onnx.data
        part.unlink()
    if _size(model) > ONE_FILE:
        with open(_data(file), "wb") as data:
            for tensor in _tensors(model.graph):
                if len(tensor.raw_data) >= EXTERNAL:
                    set_external_data(tensor, _data(file).name, data.tell(), len(tensor.raw_data))
                    data.write(tensor.raw_data)
                    tensor.ClearField("raw_data")
    file.write_bytes(model.SerializeToString())


def make_sparse(folder: Path) -> None:
    """Store each weight of each graph in a folder as a `sparse_initializer` where that takes fewer bytes."""
    for file in sorted(folder.glob("*.onnx")):
        model = onnx.load(file)
        for graph in _graphs(model.graph):
            for index in reversed(range(len(graph.initializer))):
                smaller = _as_sparse(graph.initializer[index])
                if smaller is not None:
                    graph.sparse_initializer.append(smaller)
                    del graph.initializer[index]
        write(model, file)


def quantize(folder: Path) -> None:
    """Quantize the weights of each graph in a folder to int8, activations when it runs (`quantize_dynamic`)."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    for file in sorted(folder.glob("*.onnx")):
        quantized = file.with_suffix(".quantized")
        model = onnx.load(file)
        del model.graph.value_info[:]  # shapes that torch wrote, which are wrong after the quantizer's transpositions
        quantize_dynamic(
            model,
            quantized,
            weight_type=QuantType.QInt8,  # symmetric: zero stays zero
            per_channel=True,
            use_external_data_format=_size(model) > ONE_FILE,
            extra_options={"EnableSubgraph": True},  # a merged decoder's two halves are subgraphs
        )
        write(onnx.load(quantized), file)
        for part in folder.glob(f"{quantized.name}*"):
            part.unlink()


def session_options(threads: int | None) -> SessionOptions:
    """Of a session with so many threads, or one for each core."""
    options = SessionOptions()
    options.intra_op_num_threads = threads or 0
    return options


def _as_sparse(tensor: TensorProto) -> SparseTensorProto | None:
    """None if it is no weight, or would not be smaller."""
    if len(tensor.dims) < 2 or tensor.data_type not in VALUES:
        return None
    array = numpy_helper.to_array(tensor)
    # not the standard's int64, with which a float32 takes 12 bytes; ONNX Runtime reads any signed integers
    dtype = next(dtype for dtype in (np.int16, np.int32, np.int64) if array.size <= np.iinfo(dtype).max)
    nonzero = np.flatnonzero(array).astype(dtype)
    if nonzero.size * (nonzero.itemsize + array.itemsize) >= array.nbytes:
        return None
    sparse = SparseTensorProto(dims=tensor.dims)
    sparse.values.CopyFrom(numpy_helper.from_array(array.flat[nonzero], tensor.name))
    sparse.indices.CopyFrom(numpy_helper.from_array(nonzero, f"{tensor.name}_indices"))
    return sparse


def _data(file: Path) -> Path:
    return file.with_name(f"{file.name}_data")


def _size(model: ModelProto) -> int:
    """Bytes of the tensors."""
    return sum(len(tensor.raw_data) for tensor in _tensors(model.graph))


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    for part in _graphs(graph):
        yield from part.initializer
        for sparse in part.sparse_initializer:
            yield from (sparse.values, sparse.indices)


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph and its subgraphs."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
