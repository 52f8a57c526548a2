"""Integer codes on disk: int8, or two codes of at most four bits in a byte."""

from __future__ import annotations

import torch
from torch import Tensor

NIBBLE_BITS = 4


def is_packed(num_bits: int) -> bool:
    """Returns whether two codes of this width are stored in one byte."""
    return num_bits <= NIBBLE_BITS


def stored_bits(num_bits: int) -> int:
    """Returns how many bits a code of `num_bits` takes on disk."""
    return NIBBLE_BITS if is_packed(num_bits) else 8


def pack_int4(codes: Tensor) -> Tensor:
    """Packs signed codes in -8..7, shape `[C_out, ...]`, to uint8, shape `[C_out, ceil(K / 2)]`.

    Byte j of a row holds code 2j in its low half and code 2j + 1 in its high half; an odd row ends with a zero half.
    """
    rows = codes.reshape(codes.shape[0], -1).to(torch.int16)
    if rows.shape[1] % 2:
        rows = torch.nn.functional.pad(rows, (0, 1))
    low, high = rows[:, 0::2] & 0xF, rows[:, 1::2] & 0xF
    return (low | (high << NIBBLE_BITS)).to(torch.uint8)


def unpack_int4(packed: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Returns the int8 codes that `pack_int4` packed, in `shape`."""
    low, high = packed & 0xF, packed >> NIBBLE_BITS
    rows = torch.stack((low, high), dim=-1).reshape(packed.shape[0], -1).to(torch.int8)
    signed = torch.where(rows > 7, rows - 16, rows)
    per_row = 1
    for size in shape[1:]:
        per_row *= size
    return signed[:, :per_row].reshape(shape).contiguous()
