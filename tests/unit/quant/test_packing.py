"""Packed codes: nothing is lost, whatever the shape and width, and no bit is wasted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edadm_cli.quant.packing import pack, unpack
from edadm_cli.quant.storage import is_packed, stored_bits

SHAPES = st.one_of(
    st.tuples(st.integers(1, 5), st.integers(1, 17)),
    st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3)),
)


@given(SHAPES, st.sampled_from([2, 3, 4]), st.integers(0, 2**31))
@settings(max_examples=100)
def test_packing_is_undone_by_unpacking(shape: tuple[int, ...], bits: int, seed: int) -> None:
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack(codes, bits)
    per_row = codes[0].numel()
    assert packed.dtype == torch.uint8
    assert packed.shape == (shape[0], (per_row * bits + 7) // 8)
    unpacked = unpack(packed, shape, bits)
    assert unpacked.dtype == torch.int8
    assert unpacked.is_contiguous()
    assert torch.equal(unpacked, codes)


def test_every_pair_of_codes_survives() -> None:
    codes = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)
    packed = pack(codes, 4)
    assert len(packed.unique()) == 256
    assert torch.equal(unpack(packed, codes.shape, 4), codes)


@pytest.mark.parametrize(
    ("bits", "codes", "row"),
    [
        (4, [1, -1, 7], [0xF1, 0x07]),
        (4, [-8, 0, -2], [0x08, 0x0E]),
        (2, [1, -1, -2, 0, 1], [0b00101101, 0b01]),
        (3, [1, -1, -4], [0b00111001, 0b1]),
    ],
)
def test_the_first_code_lies_in_the_lowest_bits_and_a_row_ends_with_zeros(
    bits: int, codes: list[int], row: list[int]
) -> None:
    assert pack(torch.tensor([codes], dtype=torch.int8), bits).tolist() == [row]


def test_widths_up_to_four_bits_are_packed() -> None:
    assert [bits for bits in range(2, 9) if is_packed(bits)] == [2, 3, 4]
    assert [stored_bits(bits) for bits in range(2, 9)] == [2, 3, 4, 8, 8, 8, 8]
