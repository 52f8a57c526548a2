"""Two codes a byte: nothing is lost, whatever the shape."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edadm_cli.quant.packing import is_packed, pack_int4, unpack_int4

SHAPES = st.one_of(
    st.tuples(st.integers(1, 5), st.integers(1, 17)),
    st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3)),
)


@given(SHAPES, st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_packing_is_undone_by_unpacking(shape: tuple[int, ...], seed: int) -> None:
    codes = torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack_int4(codes)
    per_row = codes[0].numel()
    assert packed.dtype == torch.uint8
    assert packed.shape == (shape[0], (per_row + 1) // 2)
    found = unpack_int4(packed, shape)
    assert found.dtype == torch.int8
    assert found.is_contiguous()
    assert torch.equal(found, codes)


def test_every_pair_of_codes_survives() -> None:
    codes = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)
    packed = pack_int4(codes)
    assert len(packed.unique()) == 256
    assert torch.equal(unpack_int4(packed, codes.shape), codes)


def test_the_first_code_lies_in_the_low_half_and_an_odd_row_ends_with_a_zero_half() -> None:
    packed = pack_int4(torch.tensor([[1, -1, 7], [-8, 0, -2]], dtype=torch.int8))
    assert packed.tolist() == [[0xF1, 0x07], [0x08, 0x0E]]


def test_widths_up_to_four_bits_are_packed() -> None:
    assert [bits for bits in range(2, 9) if is_packed(bits)] == [2, 3, 4]
