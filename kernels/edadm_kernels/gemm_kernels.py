"""The matrix product of int8 codes, and the kernel that adds the parts of a split product."""

from __future__ import annotations

import triton
import triton.language as tl

from edadm_kernels.epilogue import border_class, correct, finish, rescale, store_floats
from edadm_kernels.launching import await_previous
from edadm_kernels.nibbles import dot_packed
from edadm_kernels.schedule import steps_of_part, tile_of


@triton.jit
def _sum(
    x, weight, x_rows, w_rows, first, last, K,
    EVEN_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Returns the sums of a tile over a range of steps, int32 `[BM, BN]`.

    Args:
        x: The left operand, `[M, K]`.
        weight: The weight, `[N, K]`.
        x_rows: Offsets of the rows of `x` that the tile reads, `[BM, 1]`.
        w_rows: The rows of `weight` that the tile reads, `[BN, 1]`.
        first: The first step.
        last: The step after the last.
        K: Terms per sum.
    """
    ks = tl.arange(0, BK)
    x_at = x + x_rows + ks[None, :] + first * BK
    w_at = weight + w_rows * K + ks[None, :] + first * BK
    acc = tl.zeros((BM, BN), tl.int32)
    for step in range(first, last):
        if EVEN_K:
            a = tl.load(x_at)
            b = tl.load(w_at)
        else:
            inside = (ks < K - step * BK)[None, :]
            a = tl.load(x_at, mask=inside, other=0)
            b = tl.load(w_at, mask=inside, other=0)
        acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)
        x_at += BK
        w_at += BK
    return acc


@triton.jit
def _sum_packed(x, weight, x_rows, w_rows, first, last, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Returns what `_sum` returns; `weight` has packed four-bit codes, `[N, K / 2]`."""
    half = tl.arange(0, BK // 2)
    bytes_per_row = tl.multiple_of(K // 2, BK // 2)  # allows loads of 16 bytes
    x_low = x + x_rows + half[None, :] + first * BK
    packed_at = weight + w_rows * bytes_per_row + half[None, :] + first * (BK // 2)
    acc = tl.zeros((BN, BM), tl.int32)
    for _ in range(first, last):
        packed = tl.load(packed_at).to(tl.int8, bitcast=True)
        low = tl.load(x_low)
        high = tl.load(x_low + BK // 2)
        acc = dot_packed(packed, low, high, acc)
        x_low += BK
        packed_at += BK // 2
    return (acc >> 4).T  # the codes were multiplied by sixteen


@triton.jit
def gemm_kernel(
    x,
    weight,
    scale,
    correction,
    bias,
    sample_bias,
    residual,
    out_scale,
    out_zero_point,
    out,
    M,
    N,
    K,
    rows_per_sample,
    W4: tl.constexpr,
    EVEN_K: tl.constexpr,
    ONE_SAMPLE: tl.constexpr,
    GEGLU_MAX: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    COLUMN_PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Multiplies `x [M, K]` by the transposed `weight [N, K]` and computes the epilogue.

    With `SPLIT`, `out` is int32 `[parts, M, N]` and receives the sums alone. With `GEGLU_MAX > 0`, `out` is int8
    `[M, N / 2]` and GEGLU_MAX is the largest unsigned code. Rows and columns past the end repeat the first, so that
    only the store needs a mask.
    """
    tl.static_assert((64 if W4 else 32) <= BK, "an int8 MMA takes 32 values of K")
    pid_m, pid_n = tile_of(tl.program_id(0), M, N, BM, BN, GROUP_M)
    rows = pid_m * BM + tl.arange(0, BM)
    cols = pid_n * BN + tl.arange(0, BN)
    first, last = steps_of_part(tl.cdiv(K, BK))
    x_rows = tl.where(rows < M, rows, 0)[:, None] * K
    w_rows = tl.where(cols < N, cols, 0)[:, None]
    await_previous(OVERLAP)
    if W4:
        acc = _sum_packed(x, weight, x_rows, w_rows, first, last, K, BM, BN, BK)
    else:
        acc = _sum(x, weight, x_rows, w_rows, first, last, K, EVEN_K, BM, BN, BK)
    finish(
        acc, scale, correction, None, bias, sample_bias, residual, out_scale, out_zero_point, out, rows, pid_n * BN,
        M, N, rows_per_sample, tl.program_id(1), ONE_SAMPLE, GEGLU_MAX, SPLIT, COLUMN_PARTS,
    )  # fmt: skip


@triton.jit
def join_kernel(
    parts,
    scale,
    correction,
    bias,
    sample_bias,
    residual,
    out,
    M,
    N,
    rows_per_sample,
    out_width,
    height,
    width,
    STRIDE: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TOP: tl.constexpr,
    BOTTOM: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Adds int32 `[PARTS, M, N]` and computes the epilogue of the product, with the border classes of a convolution."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    offsets = rows[:, None] * N + cols[None, :]
    await_previous(OVERLAP)
    total = tl.zeros((BM, BN), tl.int32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * tl.cast(M, tl.int64) * N + offsets, mask=mask, other=0)
    border = None
    if TOP + BOTTOM + LEFT + RIGHT > 0:
        pixel = rows % rows_per_sample
        border = border_class(pixel, out_width, height, width, STRIDE, KH, KW, TOP, BOTTOM, LEFT, RIGHT)
    total = correct(total, correction, border, cols, N)
    y = rescale(total, scale, bias, cols, N)
    store_floats(y, sample_bias, residual, out, rows, cols, M, N, rows_per_sample, False)
