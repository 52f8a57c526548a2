"""Float to code inside a kernel, bit for bit as the reference rounds."""

from __future__ import annotations

import triton
import triton.language as tl

# 1.5 * 2^23: in x + MAGIC the unit in the last place is 1, so the sum is rounded to nearest even and the low bits of
# its pattern are the integer. Holds for |x| <= 2^22.
MAGIC = tl.constexpr(12582912.0)
CODE_OFFSET = tl.constexpr(128)


@triton.jit
def reciprocal(scale):
    """1 / scale, correctly rounded (Triton's `/` is the approximate division)."""
    return tl.div_rn(scale * 0 + 1.0, scale)


@triton.jit
def quantize_s8(x, inverse_scale, zero_point, QUANT_MAX: tl.constexpr):
    """Codes `s = clamp(rne(x * inverse_scale) + zero_point, 0, QUANT_MAX) - 128` as int8.

    The clamp comes first: its bounds are whole numbers, so it commutes with the rounding, and it keeps the rounding
    trick and the cast in range. Exact for |zero_point| <= 2^22 - 256.

    Args:
        x: float32 block.
        inverse_scale: float32, broadcasts against `x`.
        zero_point: int32, broadcasts against `x`, convention of the unsigned code.
        QUANT_MAX: Largest unsigned code, at most 255.
    """
    shift = zero_point.to(tl.float32)
    scaled = tl.minimum(tl.maximum(x * inverse_scale, -shift), QUANT_MAX - shift)
    pattern = (scaled + MAGIC).to(tl.int32, bitcast=True)
    return (pattern + (zero_point - CODE_OFFSET)).to(tl.int8)
