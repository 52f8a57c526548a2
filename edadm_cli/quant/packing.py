"""Stores integer codes on disk: as int8, or without unused bits for codes of at most four bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edadm_cli.quant.storage import NIBBLE_BITS, packed_bytes


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs signed codes, shape `[C_out, ...]`, to uint8, shape `[C_out, ceil(K * bits / 8)]`.

    Code j of a row has the bits j * bits to (j + 1) * bits - 1, counted from the lowest bit of the row's first byte;
    the last byte ends with zeros. With four bits, byte j holds code 2j in its low half and code 2j + 1 in its high one.

    Args:
        codes: Whole numbers from -2^(bits - 1) to 2^(bits - 1) - 1.
        bits: The bits that a code takes, from 2 to 4.
    """
    in_group, bytes_per_group = _group(bits)
    rows = codes.reshape(codes.shape[0], -1).to(torch.int32)
    per_row = rows.shape[1]
    rows = torch.nn.functional.pad(rows, (0, -per_row % in_group)).view(len(rows), -1, in_group)
    rows = rows & ((1 << bits) - 1)
    words = sum((rows[..., place] << (bits * place) for place in range(1, in_group)), rows[..., 0])
    packed = torch.stack([(words >> (8 * place)) & 0xFF for place in range(bytes_per_group)], dim=-1)
    return packed.to(torch.uint8).flatten(1)[:, : packed_bytes(per_row, bits)].contiguous()


def unpack(packed: Tensor, shape: torch.Size | tuple[int, ...], bits: int) -> Tensor:
    """Returns the int8 codes that `pack` packed, in `shape`."""
    in_group, bytes_per_group = _group(bits)
    padding = -packed.shape[1] % bytes_per_group
    wide = packed if bits == NIBBLE_BITS else packed.to(torch.int32)  # a group of other widths takes more than a byte
    rows = torch.nn.functional.pad(wide, (0, padding)).view(len(packed), -1, bytes_per_group)
    words = sum((rows[..., place] << (8 * place) for place in range(1, bytes_per_group)), rows[..., 0])
    mask, half = (1 << bits) - 1, 1 << (bits - 1)
    codes = torch.stack([(words >> (bits * place)) & mask for place in range(in_group)], dim=-1).flatten(1)
    signed = (codes.to(torch.int8) ^ half) - half  # two's complement of the codes' bits
    return signed[:, : math.prod(shape[1:])].reshape(shape).contiguous()


def _group(bits: int) -> tuple[int, int]:
    """Returns the smallest number of codes of `bits` bits that fills whole bytes, and the number of these bytes."""
    codes = 8 // math.gcd(8, bits)
    return codes, codes * bits // 8
