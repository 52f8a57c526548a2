"""Rounds floating point to codes inside a kernel, with the same bits as the reference."""

from __future__ import annotations

import triton
import triton.language as tl

# 1.5 * 2^23: in x + MAGIC the unit in the last place is 1, so the sum is rounded to nearest even and the low bits of
# its pattern are the integer. This is true for |x| <= 2^22.
MAGIC = tl.constexpr(12582912.0)
CODE_OFFSET = tl.constexpr(128)


@triton.jit
def reciprocal(scale):
    """Returns 1 / scale, correctly rounded; the operator `/` of Triton is an approximate division."""
    return tl.div_rn(scale * 0 + 1.0, scale)


@triton.jit
def quantize_s8(x, inverse_scale, zero_point, QUANT_MAX: tl.constexpr):
    """Returns codes `s = clamp(rne(x * inverse_scale) + zero_point, 0, QUANT_MAX) - 128` as int8.

    The clamp is computed first: its bounds are whole numbers, so it commutes with the rounding, and it keeps the sum
    with `MAGIC` and the cast in range. The result is exact for |zero_point| <= 2^22 - 256.

    Args:
        x: float32 block.
        inverse_scale: float32, broadcasts against `x`.
        zero_point: int32, broadcasts against `x`, in the convention of unsigned codes.
        QUANT_MAX: Largest unsigned code, at most 255.
    """
    shift = zero_point.to(tl.float32)
    scaled = tl.minimum(tl.maximum(x * inverse_scale, -shift), QUANT_MAX - shift)
    pattern = (scaled + MAGIC).to(tl.int32, bitcast=True)
    return (pattern + (zero_point - CODE_OFFSET)).to(tl.int8)
