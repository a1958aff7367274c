"""One linear layer, its weight sparse and compressed, beside the dense product in bf16 that torch takes."""

import torch
import torch.nn.functional as F
from timing import as_graph, bandwidth, device, medians
from torch import nn

from peft_pst import format_table
from peft_pst.sparse.gpu_serving import FEW, in_tiles
from peft_pst.sparse.linear import SparseLinear

SHAPE = (11008, 4096)
DENSITIES = (0.5, 0.2, 0.1, 0.05)
TOKENS = (1, 2, 4, 8, 16, 32, 128, 1024, 4096)
BEYOND_CACHES = 2**28
"""Bytes of weights that a turn goes through, at least."""


def sparse_layer(shape: tuple[int, int], density: float) -> SparseLinear:
    out, size = shape
    linear = nn.Linear(size, out, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    linear.weight.masked_fill_(torch.rand(shape) >= density, 0)
    return SparseLinear.from_linear(linear).to(device())


def compressed_bytes(layer: SparseLinear) -> int:
    """What the kernels read of a weight."""
    return sum(tensor.nbytes for tensor in in_tiles(layer)[:3])


@torch.no_grad()
def report(
    shape: tuple[int, int] = SHAPE,
    densities: tuple[float, ...] = DENSITIES,
    tokens: tuple[int, ...] = TOKENS,
    rounds: int = 20,
    beyond: int = BEYOND_CACHES,
) -> str:
    """The table of all densities and numbers of tokens."""
    out, size = shape
    copy, rows = bandwidth(min(2**30, 4 * beyond)), []
    dense = [torch.randn(shape, dtype=torch.bfloat16, device=device()) for _ in range(-(-beyond // (2 * out * size)))]
    for density in densities:
        first = sparse_layer(shape, density)
        compressed = compressed_bytes(first)
        layers = [first, *(sparse_layer(shape, density) for _ in range(-(-beyond // compressed) - 1))]
        weight = first.weight
        for count in tokens:
            x = torch.randn(count, size, dtype=torch.bfloat16, device=device())
            expected = F.linear(x.float(), weight.float())
            error = float((first(x) - expected).abs().max() / expected.abs().max())
            ways = {
                "dense": lambda x=x: [F.linear(x, w) for w in dense],
                "sparse": lambda x=x, layers=layers: [w(x) for w in layers],
            }
            taken = medians({name: as_graph(call) for name, call in ways.items()}, rounds)
            of_dense, of_sparse = taken["dense"] / len(dense), taken["sparse"] / len(layers)
            share = f"{compressed / of_sparse / copy:.0%}" if count <= FEW else ""
            rows.append(
                (
                    f"{1 - density:.0%}",
                    f"{count:,}",
                    f"{of_dense:,.1f} µs",
                    f"{of_sparse:,.1f} µs",
                    f"{of_dense / of_sparse:.2f}x",
                    share,
                    f"{compressed / (2 * out * size):.3f}",
                    f"{error:.0e}",
                )
            )
    columns = ("sparsity", "tokens", "dense", "sparse", "speed-up", "of the bandwidth", "bytes", "error")
    origin = f"{out}x{size} in bf16, random weights, under CUDA graphs. A copy moves {copy / 1e6:.2f} TB/s."
    return f"{origin}\n\n{format_table(columns, rows)}"
