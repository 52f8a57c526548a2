"""The epilogue of a product inside its kernel: from int32 sums by correction, scale, bias and residual to the store."""

from __future__ import annotations

import triton
import triton.language as tl

from edadm_kernels.rounding import quantize_s8, reciprocal

SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit
def _outside_taps(first, size, KERNEL: tl.constexpr, AFTER: tl.constexpr):
    """Returns the border class along one axis of outputs whose taps start at `first`; see `pack.border_classes`."""
    before = tl.minimum(tl.maximum(-first, 0), KERNEL)
    after = tl.minimum(tl.maximum(first + KERNEL - size, 0), KERNEL)
    return before * (AFTER + 1) + after


@triton.jit
def border_class(
    pixel, out_width, height, width, STRIDE: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    TOP: tl.constexpr, BOTTOM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """Returns the border class of output pixels, int32 `[BM]`; see `pack.border_classes`.

    Args:
        pixel: Indices of pixels in an output that is `out_width` wide, `[BM]`.
        out_width: Width of the output.
        height: Height of the input, after upsampling.
        width: Width of the input, after upsampling.
    """
    vertical = _outside_taps((pixel // out_width) * STRIDE - TOP, height, KH, BOTTOM)
    horizontal = _outside_taps((pixel % out_width) * STRIDE - LEFT, width, KW, RIGHT)
    return vertical * ((LEFT + 1) * (RIGHT + 1)) + horizontal


@triton.jit
def correct(acc, correction, border, cols, N):
    """Subtracts the share of the zero-point from sums `[BM, BN]`; `border` is None or the border class of each row."""
    share = tl.load(correction + cols, mask=cols < N, other=0)[None, :]
    if border is not None:
        at_border = (border > 0)[:, None]
        # few rows are at a border, so most of these loads are masked out and cause no traffic
        mask = at_border & (cols < N)[None, :]
        share = tl.where(
            at_border, tl.load(correction + border[:, None] * N + cols[None, :], mask=mask, other=0), share
        )
    return acc - share


@triton.jit
def rescale(total, scale, bias, cols, N):
    """Returns `total * scale + bias` in float32; `total` has the corrected int32 sums `[BM, BN]`."""
    y = total.to(tl.float32) * tl.load(scale + cols, mask=cols < N, other=0)[None, :]
    if bias is not None:
        y = y + tl.load(bias + cols, mask=cols < N, other=0).to(tl.float32)[None, :]
    return y


@triton.jit
def store_floats(y, sample_bias, residual, out, rows, cols, M, N, rows_per_sample, ONE_SAMPLE: tl.constexpr):
    """Adds sample bias and residual to `y` `[BM, BN]` and stores it in the type of `out`."""
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    if sample_bias is not None:
        if ONE_SAMPLE:
            sample = tl.min(rows, axis=0) // rows_per_sample
            y = y + tl.load(sample_bias + sample * N + cols, mask=cols < N, other=0).to(tl.float32)[None, :]
        else:
            sample = rows // rows_per_sample
            y = y + tl.load(sample_bias + sample[:, None] * N + cols[None, :], mask=mask, other=0).to(tl.float32)
    offsets = rows[:, None] * N + cols[None, :]
    if residual is not None:
        y = y + tl.load(residual + offsets, mask=mask, other=0).to(tl.float32)
    tl.store(out + offsets, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def store_geglu(y, out_scale, out_zero_point, out, rows, first_col, M, N, QUANT_MAX: tl.constexpr):
    """Stores the codes of `value * gelu(gate)`; value and gate are columns 2j and 2j + 1 of `y` `[BM, BN]`."""
    value, gate = tl.split(tl.reshape(y, (y.shape[0], y.shape[1] // 2, 2)))
    activated = value * (0.5 * gate * (1.0 + tl.math.erf(gate * SQRT_HALF)))
    codes = quantize_s8(activated, reciprocal(tl.load(out_scale)), tl.load(out_zero_point), QUANT_MAX)
    pairs = first_col // 2 + tl.arange(0, y.shape[1] // 2)
    mask = (rows < M)[:, None] & (pairs < N // 2)[None, :]
    tl.store(out + rows[:, None] * (N // 2) + pairs[None, :], codes, mask=mask)


@triton.jit
def finish_columns(
    acc, scale, correction, border, bias, sample_bias, residual, out_scale, out_zero_point, out, rows, first_col,
    M, N, rows_per_sample, part, ONE_SAMPLE: tl.constexpr, GEGLU_MAX: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Computes the epilogue of the columns of `acc` `[BM, BN]`, which begin at `first_col`."""
    cols = first_col + tl.arange(0, acc.shape[1])
    if SPLIT:
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        tl.store(out + part.to(tl.int64) * M * N + rows[:, None] * N + cols[None, :], acc, mask=mask)
    else:
        y = rescale(correct(acc, correction, border, cols, N), scale, bias, cols, N)
        if GEGLU_MAX > 0:
            store_geglu(y, out_scale, out_zero_point, out, rows, first_col, M, N, GEGLU_MAX)
        else:
            store_floats(y, sample_bias, residual, out, rows, cols, M, N, rows_per_sample, ONE_SAMPLE)


@triton.jit
def halves(acc):
    """Returns the left and the right half of the columns; no element moves to another thread."""
    pairs = tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2))
    return tl.split(tl.permute(pairs, (0, 2, 1)))


@triton.jit
def finish(
    acc, scale, correction, border, bias, sample_bias, residual, out_scale, out_zero_point, out, rows, first_col,
    M, N, rows_per_sample, part, ONE_SAMPLE: tl.constexpr, GEGLU_MAX: tl.constexpr, SPLIT: tl.constexpr,
    COLUMN_PARTS: tl.constexpr,
):  # fmt: skip
    """Computes the epilogue of a tile in `COLUMN_PARTS` (1, 2 or 4) pieces.

    More pieces need fewer registers, so that more programs fit on a multiprocessor.

    Args:
        acc: int32 `[BM, BN]`.
        scale: As in `linear`, and so `correction`, `bias`, `sample_bias`, `residual`, `out_scale`, `out_zero_point`.
        border: Border class of each row, or None.
        out: The output, or with `SPLIT` the partial sums.
        rows: Rows of the output that the rows of the tile belong to.
        first_col: Column of the output that the first column of the tile belongs to.
        M: Rows of the output.
        N: Columns of the product.
        rows_per_sample: Rows that share a row of `sample_bias`.
        part: Index of the partial sum.
    """
    if COLUMN_PARTS == 1:
        finish_columns(
            acc, scale, correction, border, bias, sample_bias, residual, out_scale, out_zero_point, out, rows,
            first_col, M, N, rows_per_sample, part, ONE_SAMPLE, GEGLU_MAX, SPLIT,
        )  # fmt: skip
    else:
        left, right = halves(acc)
        finish(
            left, scale, correction, border, bias, sample_bias, residual, out_scale, out_zero_point, out, rows,
            first_col, M, N, rows_per_sample, part, ONE_SAMPLE, GEGLU_MAX, SPLIT, COLUMN_PARTS // 2,
        )  # fmt: skip
        finish(
            right, scale, correction, border, bias, sample_bias, residual, out_scale, out_zero_point, out, rows,
            first_col + acc.shape[1] // 2, M, N, rows_per_sample, part, ONE_SAMPLE, GEGLU_MAX, SPLIT,
            COLUMN_PARTS // 2,
        )  # fmt: skip
