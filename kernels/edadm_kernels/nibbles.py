"""Products of packed weights: the two four-bit codes of each byte are unpacked, four bytes per instruction."""

from __future__ import annotations

import triton
import triton.language as tl

from edadm_kernels.backend import INTERPRETED

_BYTEWISE = tl.constexpr(INTERPRETED)  # the interpreter does not support assembly


@triton.jit
def low_nibbles(packed):
    """Returns `16 * code` for the low halves of int8 `packed`, int8.

    It is written in assembly because LLVM shifts vectors of bytes one byte at a time, with a shuffle for each.
    """
    if _BYTEWISE:
        return packed << 4
    return tl.inline_asm_elementwise(
        "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }", "=r,r", [packed], tl.int8, True, 4
    )


@triton.jit
def high_nibbles(packed):
    """Returns `16 * code` for the high halves of int8 `packed`, int8."""
    if _BYTEWISE:
        return packed & -16
    return tl.inline_asm_elementwise("and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [packed], tl.int8, True, 4)


@triton.jit
def dot_packed(packed, low, high, acc):
    """Returns `acc` plus sixteen times the products of packed weights and codes, int32 `[BN, BM]`.

    Args:
        packed: int8 `[BN, BK / 2]`, two weights per byte.
        low: int8 `[BM, BK / 2]`, the codes that the low halves multiply.
        high: int8 `[BM, BK / 2]`, the codes that the high halves multiply.
        acc: int32 `[BN, BM]`.
    """
    acc = tl.dot(low_nibbles(packed), low.T, acc, out_dtype=tl.int32)
    return tl.dot(high_nibbles(packed), high.T, acc, out_dtype=tl.int32)
