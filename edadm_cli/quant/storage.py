"""The bits that codes and multipliers take on disk."""

from __future__ import annotations

MULTIPLIER_BITS = 4
"""Bits of the multiplier of a group of weights."""
NIBBLE_BITS = 4


def is_packed(num_bits: int) -> bool:
    """Returns whether codes of this width are stored without unused bits."""
    return num_bits <= NIBBLE_BITS


def stored_bits(num_bits: int) -> int:
    """Returns the bits that a code of `num_bits` takes on disk."""
    return num_bits if is_packed(num_bits) else 8


def stored_bits_of_format_1(num_bits: int) -> int:
    """Returns the bits that a code of `num_bits` takes in exports of format 1, where two codes share a byte."""
    return NIBBLE_BITS if is_packed(num_bits) else 8


def packed_bytes(per_row: int, bits: int) -> int:
    """Returns the bytes of a row of `per_row` codes that take `bits` each."""
    return -(-per_row * bits // 8)
