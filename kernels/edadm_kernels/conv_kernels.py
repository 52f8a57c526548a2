"""The convolution of int8 codes over NHWC as an implicit matrix product."""

from __future__ import annotations

import triton
import triton.language as tl

from edadm_kernels.epilogue import border_class, finish
from edadm_kernels.launching import await_previous
from edadm_kernels.nibbles import dot_packed
from edadm_kernels.schedule import steps_of_part, tile_of


@triton.jit
def _input_offsets(base, top_row, left_column, dh, dw, width, C, UPSAMPLE: tl.constexpr):
    """Returns the offsets of a tap in the input, int32 `[BM]`.

    `base` has the offsets of tap (0, 0), or those of the samples when upsampling.
    """
    if UPSAMPLE:
        return base + (((top_row + dh) >> 1) * width + ((left_column + dw) >> 1)) * C
    return base + (dh * width + dw) * C


@triton.jit
def _taps_inside(
    top_row, left_column, rows, M, height, width, KH: tl.constexpr, KW: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """Returns which taps of each output pixel are inside the input, int32 `[BM]`: bit dh * KW + dw is set for those."""
    columns_inside = tl.zeros((BM,), tl.int32)
    for dw in tl.static_range(KW):
        inside = (left_column + dw >= 0) & (left_column + dw < width) & (rows < M)
        columns_inside |= inside.to(tl.int32) << dw
    taps_inside = tl.zeros((BM,), tl.int32)
    for dh in tl.static_range(KH):
        inside = (top_row + dh >= 0) & (top_row + dh < height)
        taps_inside |= tl.where(inside, columns_inside << (dh * KW), 0)
    return taps_inside


@triton.jit
def _tap_and_channel(step, C, TAPS: tl.constexpr, BK: tl.constexpr, TAPS_INNER: tl.constexpr):
    """Returns tap and first channel of a step."""
    if TAPS_INNER:
        return step % TAPS, step // TAPS * BK
    steps_per_tap = tl.cdiv(C, BK)
    return step // steps_per_tap, (step % steps_per_tap) * BK


@triton.jit
def _next_step(tap, c, C, TAPS: tl.constexpr, BK: tl.constexpr, TAPS_INNER: tl.constexpr):
    """Returns tap and first channel of the next step."""
    if TAPS_INNER:
        wraps = tap == TAPS - 1
        return tl.where(wraps, 0, tap + 1), tl.where(wraps, c + BK, c)
    wraps = c + BK >= C
    return tl.where(wraps, tap + 1, tap), tl.where(wraps, 0, c + BK)


@triton.jit
def _sum(
    x, weight, w_rows, base, top_row, left_column, taps_inside, first, last, tap, c, width, C,
    EVEN_C: tl.constexpr, UPSAMPLE: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TAPS_INNER: tl.constexpr,
):  # fmt: skip
    """Returns the sums of a tile over a range of steps, int32 `[BM, BN]`.

    Args:
        x: The input, `[samples, height, width, C]`.
        weight: The weight, `[N, KH, KW, C]`.
        w_rows: Rows of the weight that the tile reads, `[BN, 1]`.
        base: Where each output pixel starts in the input, as in `_input_offsets`, `[BM]`.
        top_row: Row of each output pixel's first tap, `[BM]`.
        left_column: Column of each output pixel's first tap, `[BM]`.
        taps_inside: What `_taps_inside` returns, `[BM]`.
        first: The first step.
        last: The step after the last.
        tap: Tap of the first step.
        c: First channel of the first step.
        width: Width of the input.
        C: Channels of the input.
    """
    ks = tl.arange(0, BK)
    w_at = weight + w_rows * (KH * KW * C) + ks[None, :]
    acc = tl.zeros((BM, BN), tl.int32)
    for _ in range(first, last):
        at = _input_offsets(base, top_row, left_column, tap // KW, tap % KW, width, C, UPSAMPLE)
        tap_inside = (((taps_inside >> tap) & 1) != 0)[:, None]
        x_at = x + at[:, None] + c + ks[None, :]
        if EVEN_C:
            a = tl.load(x_at, mask=tap_inside, other=0)
            b = tl.load(w_at + tap * C + c)
        else:
            a = tl.load(x_at, mask=tap_inside & (c + ks < C)[None, :], other=0)
            b = tl.load(w_at + tap * C + c, mask=(c + ks < C)[None, :], other=0)
        acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)
        tap, c = _next_step(tap, c, C, KH * KW, BK, TAPS_INNER)
    return acc


@triton.jit
def _sum_packed(
    x, weight, w_rows, base, top_row, left_column, taps_inside, first, last, tap, c, width, C,
    UPSAMPLE: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TAPS_INNER: tl.constexpr,
):  # fmt: skip
    """Returns what `_sum` returns; `weight` has packed four-bit codes, `[N, KH, KW, C / 2]`."""
    half = tl.arange(0, BK // 2)
    bytes_per_tap = tl.multiple_of(C // 2, BK // 2)  # allows loads of 16 bytes
    w_at = weight + w_rows * (KH * KW * bytes_per_tap) + half[None, :]
    acc = tl.zeros((BN, BM), tl.int32)
    for _ in range(first, last):
        at = _input_offsets(base, top_row, left_column, tap // KW, tap % KW, width, C, UPSAMPLE)
        tap_inside = (((taps_inside >> tap) & 1) != 0)[:, None]
        x_at = x + at[:, None] + c + half[None, :]
        packed = tl.load(w_at + tap * bytes_per_tap + tl.multiple_of(c // 2, BK // 2)).to(tl.int8, bitcast=True)
        low = tl.load(x_at, mask=tap_inside, other=0)
        high = tl.load(x_at + BK // 2, mask=tap_inside, other=0)
        acc = dot_packed(packed, low, high, acc)
        tap, c = _next_step(tap, c, C, KH * KW, BK, TAPS_INNER)
    return (acc >> 4).T  # the codes were multiplied by sixteen


@triton.jit
def conv_kernel(
    x,
    weight,
    scale,
    correction,
    bias,
    sample_bias,
    residual,
    out,
    M,
    N,
    C,
    height,
    width,
    out_pixels,
    out_width,
    W4: tl.constexpr,
    EVEN_C: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    ONE_SAMPLE: tl.constexpr,
    STRIDE: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TOP: tl.constexpr,
    BOTTOM: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    COLUMN_PARTS: tl.constexpr,
    TAPS_INNER: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Convolves `x [samples, height, width, C]` with `weight [N, KH, KW, C]` into M output pixels of N channels.

    A step of the sum is BK channels of one tap, so every load is a run of one pixel's channels. With `TAPS_INNER` the
    steps visit all taps of some channels before the next channels: neighbouring taps read the same pixels while the L1
    has them. With `SPLIT`, `out` is int32 `[parts, M, N]` and receives the sums alone.
    """
    tl.static_assert((64 if W4 else 32) <= BK, "an int8 MMA takes 32 values of K")
    pid_m, pid_n = tile_of(tl.program_id(0), M, N, BM, BN, GROUP_M)
    rows = pid_m * BM + tl.arange(0, BM)
    cols = pid_n * BN + tl.arange(0, BN)
    sample = rows // out_pixels
    pixel = rows % out_pixels
    top_row = (pixel // out_width) * STRIDE - TOP
    left_column = (pixel % out_width) * STRIDE - LEFT
    seen_height = height * 2 if UPSAMPLE else height
    seen_width = width * 2 if UPSAMPLE else width

    taps_inside = _taps_inside(top_row, left_column, rows, M, seen_height, seen_width, KH, KW, BM)
    origin = sample * height if UPSAMPLE else sample * height + top_row
    base = origin * width * C if UPSAMPLE else (origin * width + left_column) * C

    first, last = steps_of_part(KH * KW * tl.cdiv(C, BK))
    tap, c = _tap_and_channel(first, C, KH * KW, BK, TAPS_INNER)
    w_rows = tl.where(cols < N, cols, 0)[:, None]
    await_previous(OVERLAP)
    if W4:
        acc = _sum_packed(
            x, weight, w_rows, base, top_row, left_column, taps_inside, first, last, tap, c, width, C,
            UPSAMPLE, KH, KW, BM, BN, BK, TAPS_INNER,
        )  # fmt: skip
    else:
        acc = _sum(
            x, weight, w_rows, base, top_row, left_column, taps_inside, first, last, tap, c, width, C,
            EVEN_C, UPSAMPLE, KH, KW, BM, BN, BK, TAPS_INNER,
        )  # fmt: skip

    border = None
    if TOP + BOTTOM + LEFT + RIGHT > 0:
        border = border_class(pixel, out_width, seen_height, seen_width, STRIDE, KH, KW, TOP, BOTTOM, LEFT, RIGHT)
    finish(
        acc, scale, correction, border, bias, sample_bias, residual, None, None, out, rows, pid_n * BN,
        M, N, out_pixels, tl.program_id(1), ONE_SAMPLE, 0, SPLIT, COLUMN_PARTS,
    )  # fmt: skip
