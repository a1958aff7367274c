"""What the kernels of a masked step share: a tile of W', of its importance, and of the mask.

Sums over ranks are chains of fused multiply-adds in one order, so that each kernel that computes an entry again gets
the same bits: the selection reads the importance several times and never stores it.
"""

import triton
import triton.language as tl


@triton.jit
def updated_tile(W, U, V, beta, rows, columns, stride_n, stride_k, n, k, R: tl.constexpr):
    """W' = W + beta · U V in fp32, [rows, columns]; 0 outside of the weight."""
    inside = (rows < n)[:, None] & (columns < k)[None, :]
    at = rows.to(tl.int64)[:, None] * stride_n + columns.to(tl.int64)[None, :] * stride_k
    weight = tl.load(W + at, mask=inside, other=0.0).to(tl.float32)
    return tl.fma(_product(U, V, rows, columns, n, k, R), beta, weight)


@triton.jit
def importance_tile(weight, A, B, rows_R, columns_C, alpha1, alpha2, rows, columns, n, k, MASK_R: tl.constexpr):
    """S = |W'| + alpha1 · A B + alpha2 · (R 1ᵀ + 1 Cᵀ), [rows, columns]."""
    R = tl.load(rows_R + rows, mask=rows < n, other=0.0).to(tl.float32)
    C = tl.load(columns_C + columns, mask=columns < k, other=0.0).to(tl.float32)
    single = tl.fma(_product(A, B, rows, columns, n, k, MASK_R), alpha1, tl.abs(weight))
    return tl.fma(R[:, None] + C[None, :], alpha2, single)


@triton.jit
def _product(left, right, rows, columns, n, k, R: tl.constexpr):
    """left · right of [n, R] and [R, k], at a tile."""
    total = tl.zeros((rows.shape[0], columns.shape[0]), dtype=tl.float32)
    for i in tl.static_range(R):
        of_row = tl.load(left + rows * R + i, mask=rows < n, other=0.0).to(tl.float32)
        of_column = tl.load(right + i * k + columns, mask=columns < k, other=0.0).to(tl.float32)
        total = tl.fma(of_row[:, None], of_column[None, :], total)
    return total


@triton.jit
def ordered_keys(importance):
    """Unsigned 32-bit integers in the order of fp32 values; -0.0 is 0.0."""
    bits = importance.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -2147483648, 0, bits)
    return tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)


@triton.jit
def pack_tile(keep, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of a mask as bytes, [BLOCK_N, BLOCK_K / 8], in the order of `numpy.packbits`."""
    places = 7 - tl.arange(0, 8)
    bits = keep.to(tl.int32).reshape(BLOCK_N, BLOCK_K // 8, 8) << places[None, None, :]
    return tl.sum(bits, axis=2).to(tl.uint8)


@triton.jit
def unpack_tile(bits, rows, columns, n, k):
    """A tile of a mask from its bytes, int1."""
    inside = (rows < n)[:, None] & (columns < k)[None, :]
    at = rows.to(tl.int64)[:, None] * (k // 8) + (columns // 8)[None, :]
    found = tl.load(bits + at, mask=inside, other=0).to(tl.int32)
    return ((found >> (7 - columns % 8)[None, :]) & 1) != 0
