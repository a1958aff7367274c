"""Whether the kernels are faster than a dense product, by a small table of what each takes.

The figures are of one thread of an AMD EPYC (Zen 5), by `benchmarks/sparse_linear.py --costs`; dense is the faster of
MKL and oneDNN. What matters are their ratios, and these shift little between processors with wide vectors.
"""

from __future__ import annotations

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
    _cost(1, 0.090, 0.191, 0.196, 0.190, 0.5),
    _cost(3, 0.182, 0.336, 0.240, 0.240, 2.4),
    _cost(6, 0.233, 0.338, 0.308, 0.302, 5.2),
    _cost(12, 0.293, 0.371, 0.310, 0.306, 9.4),
    _cost(24, 0.442, 0.567, 0.467, 0.453, 9.7),
    _cost(48, 0.690, 1.009, 0.895, 0.860, 13.3),
    _cost(128, 1.472, 2.078, 1.868, 1.781, 19.9),
)
"""For 1 token, for 2 to 3, for 4 to 7 and so on, and for 64 or more."""


def row_of(tokens: int) -> int:
    """The place in `COSTS` for a number of tokens; none at all count as many."""
    return min(tokens.bit_length(), len(COSTS)) - 1


def kernel_is_faster(packed: Packed) -> list[bool]:
    """Whether the kernels are, for a weight and each row of `COSTS`."""
    return _is_faster(packed.shape, packed.kind, packed.values.numel(), packed.bits is not None)


def kernel_may_be_faster(shape: tuple[int, int], kind: Kind, nonzero: int) -> bool:
    """Whether packing a weight [out, in] can be of use, which stores its non-zero values and some more."""
    return any(_is_faster(shape, kind, nonzero, kind is Kind.INT8))


def _is_faster(shape: tuple[int, int], kind: Kind, values: int, has_bitmask: bool) -> list[bool]:
    out, size = shape

    def by_kernel(cost: Cost) -> float:
        products = BITMASK * out * size if cost.tokens == 1 and has_bitmask else cost.values[kind] * values
        return KERNEL_CALL + cost.moved * (out + size) + products

    def by_dense(cost: Cost) -> float:
        entry = BEYOND_CACHE if cost.tokens == 1 and out * size > IN_CACHE else cost.dense
        return DENSE_CALL + entry * out * size

    return [MARGIN * by_kernel(cost) < by_dense(cost) for cost in COSTS]
