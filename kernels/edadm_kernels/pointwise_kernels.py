"""The kernels that quantize a tensor, or two of them side by side."""

from __future__ import annotations

import triton
import triton.language as tl

from edadm_kernels.launching import await_previous
from edadm_kernels.rounding import quantize_s8, reciprocal


@triton.jit
def quantize_kernel(
    x,
    scale,
    zero_point,
    codes,
    count,
    columns,
    row_stride,
    QUANT_MAX: tl.constexpr,
    SILU: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Stores the codes of `count` elements; unless the input is dense, its rows of `columns` are `row_stride` apart."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    offset = index if DENSE else (index // columns).to(tl.int64) * row_stride + index % columns
    await_previous(OVERLAP)
    value = tl.load(x + offset, mask=mask, other=0).to(tl.float32)
    if SILU:
        value = value * tl.sigmoid(value)
    inverse_scale = reciprocal(tl.load(scale))
    tl.store(codes + index, quantize_s8(value, inverse_scale, tl.load(zero_point), QUANT_MAX), mask=mask)


@triton.jit
def quantize_joined_kernel(
    x,
    more,
    scale,
    zero_point,
    codes,
    count,
    columns,
    first,
    QUANT_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Stores `count` codes in rows of `columns`, of which the `first` are those of `x`, and the others of `more`."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, column = index // columns, index % columns
    in_first = column < first
    of_x = (index < count) & in_first
    of_more = (index < count) & (column >= first)
    await_previous(OVERLAP)
    value = tl.load(x + row * first + column, mask=of_x, other=0).to(tl.float32)
    other = tl.load(more + row * (columns - first) + (column - first), mask=of_more, other=0).to(tl.float32)
    value = tl.where(in_first, value, other)
    inverse_scale = reciprocal(tl.load(scale))
    tl.store(codes + index, quantize_s8(value, inverse_scale, tl.load(zero_point), QUANT_MAX), mask=index < count)
