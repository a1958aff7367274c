"""OpenVINO: a sparse model in OpenVINO IR, with int8 weights and activations, and on the kernels that skip its zeros.

OpenVINO's kernels for Intel processors with AMX keep a weight with many zeros compressed and unpack it in the cache
("sparse weights decompression"). They take a linear layer only if its input is int8 and its weight an int8 constant
[out, in] with enough zeros and both sizes divisible by 64 (`useSparseWeightsDecompression` in OpenVINO's
fullyconnected.cpp); all else runs dense, in silence. So what is exported here has that layout, and what is opened here
says what each layer of the compiled model runs on.
"""

from .export import export_openvino
from .runtime import Layer, OpenVINOModel, has_amx, open_openvino

__all__ = ["Layer", "OpenVINOModel", "export_openvino", "has_amx", "open_openvino"]
