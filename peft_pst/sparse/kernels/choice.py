"""Whether the kernels are faster than a dense product, by a small table of what each takes.

The figures are of one thread of an AMD EPYC (Zen 5), by `benchmarks/sparse_linear.py --costs`; dense is the faster of
MKL and oneDNN. What matters are their ratios, and these shift little between processors with wide vectors.
"""

from __future__ import annotations

import bisect
from typing import NamedTuple

from .layout import Kind, Packed

KERNEL_CALL, DENSE_CALL = 6000.0, 2000.0
"""ns of a call, whatever it computes."""
MARGIN = 1.1
"""By how much the kernels must seem faster: a table is never quite right."""
IN_CACHE = 2**20
"""Weights of a dense matrix that stay in the cache of a core between two calls."""
BEYOND_CACHE = 0.17
"""ns of a dense weight for one token from main memory, where those of a model are; in the last cache it is half."""
BITMASK = 0.04
"""ns of a weight with a bitmask, zero or not, for one token."""


class Cost(NamedTuple):
    """ns for so many tokens together."""

    tokens: int
    dense: float
    """Of a weight of a dense matrix."""
    values: dict[Kind, float]
    """Of a value of a sparse one."""
    moved: float
    """Of an input or an output of a sparse one."""


def _cost(tokens: int, dense: float, fp32: float, bf16: float, int8: float, moved: float) -> Cost:
    return Cost(tokens, dense, {Kind.FP32: fp32, Kind.BF16: bf16, Kind.INT8: int8, Kind.FP16: bf16}, moved)


COSTS = (
    _cost(1, 0.074, 0.243, 0.218, 0.21, 0.3),
    _cost(3, 0.179, 0.359, 0.247, 0.235, 2.6),
    _cost(6, 0.247, 0.376, 0.316, 0.309, 5.3),
    _cost(12, 0.318, 0.415, 0.340, 0.329, 10.0),
    _cost(24, 0.450, 0.610, 0.491, 0.472, 10.2),
    _cost(48, 0.676, 1.070, 0.935, 0.911, 10.3),
    _cost(128, 1.508, 2.249, 1.979, 1.931, 18.4),
)


def kernel_is_faster(packed: Packed, tokens: int) -> bool:
    """Whether the kernels are, for a weight and a number of tokens; between two of the table the lower one counts."""
    cost = COSTS[bisect.bisect_right(COSTS, tokens, key=lambda cost: cost.tokens) - 1]
    out, size = packed.shape
    dense = cost.dense if tokens > 1 or out * size <= IN_CACHE else BEYOND_CACHE
    if tokens == 1 and packed.bits is not None:
        kernel = BITMASK * out * size
    else:
        kernel = cost.values[packed.kind] * packed.values.numel()
    return MARGIN * (KERNEL_CALL + cost.moved * (out + size) + kernel) < DENSE_CALL + dense * out * size
