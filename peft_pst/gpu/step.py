"""PST's masked linear step (arXiv 2205.11005, section 3) on a GPU: what lies between its matrix products, in few
passes over the weight. `functional.py` is the same in torch.

Forward reads the weight for each of four digits of the threshold, and a last time to write the masked weight in the
dtype of the product and the mask as bits; W' and its importance are never stored. Backward reads it once for the
masked weight and once, beside the gradient of that, for those of all factors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fused import CHUNK
from .launch import device_of, num_programs
from .selection import BITS, BLOCK_K, BLOCK_N, Threshold, count_tile, keep_tile
from .tiles import importance_tile, ordered_keys, pack_tile, unpack_tile, updated_tile


def select(
    weight: Tensor, num_pruned: int | Tensor, factors: tuple[Tensor, ...], numbers: tuple[float, float, float],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """M ∘ W', [out, in] in `dtype`, and M as bits, under the mask that prunes `num_pruned` entries.

    Args:
        weight: [out, in], fp32, bf16 or fp16 in any layout; `in` a multiple of 8.
        num_pruned: a number, or an int64 scalar on the device of the weight.
        factors: U [out, r], V [r, in], A [out, mask_r], B [mask_r, in], R [out], C [in].
        numbers: beta, alpha1, alpha2.
    """
    (n, k), (U, _, A, *_) = weight.shape, factors
    masked = torch.empty((n, k), dtype=dtype, device=weight.device)
    bits = torch.empty(n * k // 8, dtype=torch.uint8, device=weight.device)
    inputs = (weight, *weight.stride(), n, k, *(factor.contiguous() for factor in factors), *numbers)
    sizes = {"RANK": U.shape[1], "MASK_RANK": A.shape[1], "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K, "num_warps": 8}
    grid = (triton.cdiv(n, BLOCK_N), triton.cdiv(k, BLOCK_K))
    with device_of(weight):
        threshold = Threshold((n, k), num_pruned, weight.device)
        for histogram, shift in threshold.digits():
            _count_digits[(num_programs((n, k), BLOCK_N, BLOCK_K),)](
                *inputs, histogram, threshold.state, SHIFT=shift, BITS=BITS, **sizes
            )
            threshold.narrow(histogram)
        _count_ties[grid](*inputs, threshold.ties, threshold.state, **sizes)
        _write_selected[grid](*inputs, threshold.ties_before(), threshold.state, masked, bits, **sizes)
    return masked, bits


def masked_weight(weight: Tensor, bits: Tensor, U: Tensor, V: Tensor, beta: float, dtype: torch.dtype) -> Tensor:
    """M ∘ W', [out, in] in `dtype`, under the mask of `bits`."""
    n, k = weight.shape
    masked = torch.empty((n, k), dtype=dtype, device=weight.device)
    inputs = (weight, *weight.stride(), n, k, U.contiguous(), V.contiguous(), beta)
    grid = (triton.cdiv(n, BLOCK_N), triton.cdiv(k, BLOCK_K))
    with device_of(weight):
        _write_kept[grid](*inputs, bits, masked, RANK=U.shape[1], BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=8)
    return masked


def gradients(
    G: Tensor,
    weight: Tensor,
    bits: Tensor | None,
    factors: tuple[Tensor, ...],
    numbers: tuple[float, float, float],
) -> tuple[Tensor, ...]:
    """The gradients of U, V, A, B, R and C in fp32, each in the shape of its factor, from that of the masked weight.
    The order of every sum is fixed.

    Args:
        G: [out, in], in the dtype of the product. Sums over an fp32 G are in fp32, over others in tf32,
            which keeps 11 bits of what is multiplied.
        weight: W as `select` takes it.
        bits: M as `select` gives it, uint8 [out * in / 8]; None if the weight learns as if nothing were pruned.
        factors, numbers: as `select` takes them.
    """
    (n, k), (U, _, A, *_) = weight.shape, factors
    r, mask_r = U.shape[1], A.shape[1]
    rows, columns = CHUNK
    chunks, blocks = triton.cdiv(k, columns), triton.cdiv(n, rows)
    of_rows = torch.empty((chunks, n, r + mask_r + 1), dtype=torch.float32, device=G.device)
    of_columns = torch.empty((blocks, r + mask_r + 1, k), dtype=torch.float32, device=G.device)
    U, V, A, B, _, _ = (factor.contiguous() for factor in factors)
    # of what is multiplied tf32 keeps 11 bits, where a G in bf16 has 8 itself; tf32x3 would take three times the
    # products and, at rank 32, more shared memory than many GPUs have. W' is to be exact in any case
    precision, exact = ("ieee", "ieee") if G.dtype == torch.float32 else ("tf32", "tf32x3")
    with device_of(weight):
        _reduce[(blocks, chunks)](
            G.contiguous(), bits, weight, *weight.stride(), n, k, U, V, A, B, *numbers, of_rows, of_columns,
            RANK=r, MASK_RANK=mask_r, PADDED=_padded(r), MASK_PADDED=_padded(mask_r), IS_MASKED=bits is not None,
            PRECISION=precision, EXACT=exact, CHUNK=columns, BLOCK_N=rows, BLOCK_K=16,
            num_warps=8, num_stages=2,
        )  # fmt: skip
    dU, dA, dR = of_rows.sum(0).split((r, mask_r, 1), dim=1)
    dV, dB, dC = of_columns.sum(0).split((r, mask_r, 1))
    return dU, dV, dA, dB, dR[:, 0], dC[0]


def _padded(rank: int) -> int:
    """The size of a dimension of `tl.dot`."""
    return max(16, triton.next_power_of_2(rank))


@triton.jit
def _tile(
    W, stride_n, stride_k, n, k, U, V, A, B, R, C, beta, alpha1, alpha2, rows, columns,
    RANK: tl.constexpr, MASK_RANK: tl.constexpr,
):  # fmt: skip
    """W', the keys of its importance, and what of the tile is inside of the weight."""
    weight = updated_tile(W, U, V, beta, rows, columns, stride_n, stride_k, n, k, RANK)
    importance = importance_tile(weight, A, B, R, C, alpha1, alpha2, rows, columns, n, k, MASK_RANK)
    return weight, ordered_keys(importance), (rows < n)[:, None] & (columns < k)[None, :]


@triton.jit
def _count_digits(
    W, stride_n, stride_k, n, k, U, V, A, B, R, C, beta, alpha1, alpha2, histogram, state,
    SHIFT: tl.constexpr, BITS: tl.constexpr,
    RANK: tl.constexpr, MASK_RANK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    total, blocks = tl.zeros((1 << BITS,), dtype=tl.int32), tl.cdiv(k, BLOCK_K)
    for tile in range(tl.program_id(0), tl.cdiv(n, BLOCK_N) * blocks, tl.num_programs(0)):
        rows = tile // blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        columns = tile % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        _, keys, inside = _tile(
            W, stride_n, stride_k, n, k, U, V, A, B, R, C, beta, alpha1, alpha2, rows, columns, RANK, MASK_RANK
        )
        total = count_tile(total, keys, inside, state, SHIFT, BITS)
    tl.atomic_add(histogram + tl.arange(0, 1 << BITS), total, mask=total > 0, sem="relaxed")


@triton.jit
def _count_ties(
    W, stride_n, stride_k, n, k, U, V, A, B, R, C, beta, alpha1, alpha2, ties, state,
    RANK: tl.constexpr, MASK_RANK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    if tl.load(state + 1) == tl.load(state + 2):  # all that tie are pruned, in whatever order
        return
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    _, keys, inside = _tile(
        W, stride_n, stride_k, n, k, U, V, A, B, R, C, beta, alpha1, alpha2, rows, columns, RANK, MASK_RANK
    )
    tied = inside & (keys == tl.load(state).to(tl.uint32))
    tl.store(ties + rows * tl.num_programs(1) + tl.program_id(1), tl.sum(tied.to(tl.int32), 1), mask=rows < n)


@triton.jit
def _write_selected(
    W, stride_n, stride_k, n, k, U, V, A, B, R, C, beta, alpha1, alpha2, before, state, masked, bits,
    RANK: tl.constexpr, MASK_RANK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    weight, keys, inside = _tile(
        W, stride_n, stride_k, n, k, U, V, A, B, R, C, beta, alpha1, alpha2, rows, columns, RANK, MASK_RANK
    )
    keep = keep_tile(keys, inside, before, state, rows, tl.program_id(1), n, tl.num_programs(1))
    at = rows.to(tl.int64)[:, None] * k + columns[None, :]
    tl.store(masked + at, tl.where(keep, weight, 0.0).to(masked.dtype.element_ty), mask=inside)
    packed = tl.program_id(1) * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
    at = rows.to(tl.int64)[:, None] * (k // 8) + packed[None, :]
    tl.store(bits + at, pack_tile(keep, BLOCK_N, BLOCK_K), mask=(rows < n)[:, None] & (packed < k // 8)[None, :])


@triton.jit
def _write_kept(
    W, stride_n, stride_k, n, k, U, V, beta, bits, masked,
    RANK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    weight = updated_tile(W, U, V, beta, rows, columns, stride_n, stride_k, n, k, RANK)
    weight = tl.where(unpack_tile(bits, rows, columns, n, k), weight, 0.0)
    at = rows.to(tl.int64)[:, None] * k + columns[None, :]
    inside = (rows < n)[:, None] & (columns < k)[None, :]
    tl.store(masked + at, weight.to(masked.dtype.element_ty), mask=inside)


@triton.jit
def _reduce(
    G, bits, W, stride_n, stride_k, n, k, U, V, A, B, beta, alpha1, alpha2, of_rows, of_columns,
    RANK: tl.constexpr, MASK_RANK: tl.constexpr, PADDED: tl.constexpr, MASK_PADDED: tl.constexpr,
    IS_MASKED: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """With D = G ∘ (M + |W'|) and dS = G ∘ W': what D and dS give to U, A and R, of the program's columns, and to V, B
    and C, of its rows."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks, mask_ranks = tl.arange(0, PADDED), tl.arange(0, MASK_PADDED)
    in_U = (rows < n)[:, None] & (ranks < RANK)[None, :]
    in_A = (rows < n)[:, None] & (mask_ranks < MASK_RANK)[None, :]
    tile_U = tl.load(U + rows[:, None] * RANK + ranks[None, :], mask=in_U, other=0.0).to(tl.float32)
    tile_A = tl.load(A + rows[:, None] * MASK_RANK + mask_ranks[None, :], mask=in_A, other=0.0).to(tl.float32)
    dU = tl.zeros((BLOCK_N, PADDED), dtype=tl.float32)
    dA = tl.zeros((BLOCK_N, MASK_PADDED), dtype=tl.float32)
    dR = tl.zeros((BLOCK_N,), dtype=tl.float32)
    width = RANK + MASK_RANK + 1
    for start in range(0, CHUNK, BLOCK_K):
        columns = tl.program_id(1) * CHUNK + start + tl.arange(0, BLOCK_K)
        inside = (rows < n)[:, None] & (columns < k)[None, :]
        in_V = (ranks < RANK)[:, None] & (columns < k)[None, :]
        in_B = (mask_ranks < MASK_RANK)[:, None] & (columns < k)[None, :]
        at_V, at_B = ranks[:, None] * k + columns[None, :], mask_ranks[:, None] * k + columns[None, :]
        tile_V = tl.load(V + at_V, mask=in_V, other=0.0).to(tl.float32)
        tile_B = tl.load(B + at_B, mask=in_B, other=0.0).to(tl.float32)
        at = rows.to(tl.int64)[:, None] * stride_n + columns.to(tl.int64)[None, :] * stride_k
        weight = tl.load(W + at, mask=inside, other=0.0).to(tl.float32)
        weight = tl.fma(tl.dot(tile_U, tile_V, input_precision=EXACT), beta, weight)
        g = tl.load(G + rows.to(tl.int64)[:, None] * k + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        mask = 1.0
        if IS_MASKED:
            mask = unpack_tile(bits, rows, columns, n, k).to(tl.float32)
        D, dS = g * (mask + tl.abs(weight)), g * weight
        dU = tl.dot(D, tl.trans(tile_V), dU, input_precision=PRECISION)
        dA = tl.dot(dS, tl.trans(tile_B), dA, input_precision=PRECISION)
        dR += tl.sum(dS, 1)
        dV = beta * tl.dot(tl.trans(tile_U), D, input_precision=PRECISION)
        dB = alpha1 * tl.dot(tl.trans(tile_A), dS, input_precision=PRECISION)
        base = of_columns + tl.program_id(0).to(tl.int64) * width * k
        tl.store(base + at_V, dV, mask=in_V)
        tl.store(base + RANK * k + at_B, dB, mask=in_B)
        tl.store(base + (RANK + MASK_RANK) * k + columns, alpha2 * tl.sum(dS, 0), mask=columns < k)
    base = of_rows + (tl.program_id(1).to(tl.int64) * n + rows.to(tl.int64)) * width
    tl.store(base[:, None] + ranks[None, :], beta * dU, mask=in_U)
    tl.store(base[:, None] + RANK + mask_ranks[None, :], alpha1 * dA, mask=in_A)
    tl.store(base + RANK + MASK_RANK, alpha2 * dR, mask=rows < n)
