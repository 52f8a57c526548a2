"""Corrections and packing, exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from edadm_kernels import reference
from edadm_kernels.pack import conv_border_table, linear_correction, pack_geglu, pack_w4, unpack_w4, w4_block
from edadm_kernels.reference.products import accumulate_conv2d, accumulate_linear, conv_correction

INTERPRETED = False


def random_codes(shape: tuple[int, ...], low: int, high: int, seed: int) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed))


@given(zero_point=st.integers(0, 255), seed=st.integers(0, 99))
def test_linear_correction_restores_the_unsigned_product(zero_point: int, seed: int) -> None:
    u, weight = random_codes((5, 33), 0, 255, seed), random_codes((7, 33), -128, 127, seed + 1).to(torch.int8)
    exact = (u - zero_point).double() @ weight.double().T
    acc = accumulate_linear((u - 128).to(torch.int8), weight)
    assert torch.equal(acc - linear_correction(weight, zero_point), exact)
    assert torch.equal(linear_correction(weight, torch.tensor([zero_point])), linear_correction(weight, zero_point))


@given(
    height=st.integers(1, 17),
    width=st.integers(1, 17),
    kernel=st.sampled_from([(1, 1), (3, 3), (3, 1), (5, 5)]),
    stride=st.sampled_from([1, 2, 3]),
    padding=st.tuples(*[st.integers(0, 3)] * 4),
    zero_point=st.sampled_from([0, 1, 100, 128, 255]),
    upsample=st.booleans(),
)
def test_the_border_table_stands_for_padding_with_the_zero_point(
    height: int,
    width: int,
    kernel: tuple[int, int],
    stride: int,
    padding: tuple[int, int, int, int],
    zero_point: int,
    upsample: bool,
) -> None:
    top, bottom, left, right = padding
    grown = 2 if upsample else 1
    if height * grown + top + bottom < kernel[0] or width * grown + left + right < kernel[1]:
        return
    u = random_codes((2, 3, height, width), 0, 255, height * 17 + width)
    weight = random_codes((4, *kernel, 3), -128, 127, 5).to(torch.int8)
    real = (u - zero_point).double()
    if upsample:
        real = F.interpolate(real, scale_factor=2, mode="nearest")
    exact = F.conv2d(F.pad(real, (left, right, top, bottom)), weight.double().permute(0, 3, 1, 2), stride=stride)
    acc = accumulate_conv2d((u - 128).to(torch.int8), weight, stride, padding, upsample)
    table = conv_border_table(weight, zero_point, padding)
    correction = conv_correction(table, height * grown, width * grown, kernel, stride, padding)
    assert table.dtype == torch.int32
    assert torch.equal(acc - correction, exact)


@pytest.mark.parametrize("channels", [64, 128, 192, 320, 640])
def test_packed_codes_come_back(channels: int) -> None:
    codes = random_codes((3, 2, channels), -8, 7, channels).to(torch.int8)
    packed = pack_w4(codes)
    assert packed.shape == (3, 2, channels // 2)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_w4(packed), codes)


def test_the_halves_of_a_block_lie_in_the_halves_of_its_bytes() -> None:
    codes = (torch.arange(64) % 16 - 8).to(torch.int8)
    codes[32:] = codes[32:].flip(0)
    packed = pack_w4(codes[None])[0]
    assert torch.equal((packed << 4).view(torch.int8), codes[:32] * 16)
    assert torch.equal((packed & 0xF0).view(torch.int8), codes[32:] * 16)


def test_blocks() -> None:
    assert [w4_block(channels) for channels in (320, 640, 96, 4)] == [64, 128, None, None]
    with pytest.raises(ValueError, match="multiple of 64 channels is expected, found 96"):
        pack_w4(torch.zeros(2, 96, dtype=torch.int8))
    with pytest.raises(ValueError, match="multiple of 32 bytes"):
        unpack_w4(torch.zeros(2, 48, dtype=torch.uint8))


def test_geglu_rows_alternate() -> None:
    rows = torch.tensor([1, 2, 3, 10, 20, 30])
    assert pack_geglu(rows).tolist() == [1, 10, 2, 20, 3, 30]
    with pytest.raises(ValueError, match="even number"):
        pack_geglu(rows[:5])


def test_the_reference_of_geglu_gates_interleaved_columns() -> None:
    x, weight = random_codes((3, 8), -128, 127, 0).to(torch.int8), random_codes((6, 8), -128, 127, 1).to(torch.int8)
    ones, zeros = torch.ones(6), torch.zeros(6, dtype=torch.int32)
    out = reference.linear_geglu(
        x, pack_geglu(weight), ones * 1e-3, zeros, None, torch.tensor(1.0), torch.tensor(9, dtype=torch.int32)
    )
    value, gate = (accumulate_linear(x, weight).float() * 1e-3).double().chunk(2, dim=1)
    assert torch.equal(out.int() + 128, ((value * F.gelu(gate)).float().round() + 9).clamp(0, 255).int())
