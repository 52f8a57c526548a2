"""Two four-bit codes of a byte as sixteen times themselves, four bytes at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from edadm_kernels.backend import INTERPRETED

_BYTEWISE = tl.constexpr(INTERPRETED)  # the interpreter knows no assembly


@triton.jit
def low_nibbles(packed):
    """`16 * code` of the low halves of int8 `packed`, int8.

    In assembly because LLVM shifts vectors of bytes one by one, with a shuffle each.
    """
    if _BYTEWISE:
        return packed << 4
    return tl.inline_asm_elementwise(
        "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }", "=r,r", [packed], tl.int8, True, 4
    )


@triton.jit
def high_nibbles(packed):
    """`16 * code` of the high halves of int8 `packed`, int8."""
    if _BYTEWISE:
        return packed & -16
    return tl.inline_asm_elementwise("and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [packed], tl.int8, True, 4)
