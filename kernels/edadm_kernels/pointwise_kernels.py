"""The kernel that quantizes a tensor."""

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
