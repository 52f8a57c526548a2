"""Quantization of a tensor is equal to the reference code for code, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from edadm_cli.quant import grid
from edadm_kernels import quantize, quantize_joined, reference, silu_quantize, uses_kernel

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def quantizer(scale: float, zero_point: int) -> tuple[Tensor, Tensor]:
    return torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32)


def values(shape: tuple[int, ...], spread: float, seed: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread
    x.view(-1)[::7] = 0.0
    return x


def test_these_tests_run_the_kernels() -> None:
    assert uses_kernel(torch.zeros(1))


@settings(max_examples=40)
@given(
    rows=st.integers(1, 90),
    columns=st.integers(1, 60),
    dtype=st.sampled_from(DTYPES),
    num_bits=st.sampled_from([2, 4, 8]),
    scale=st.sampled_from([1e-30, 1e-6, 0.0371, 0.25, 3.0, 1e6]),
    zero_point=st.sampled_from([-100_000, -3, 0, 1, 127, 128, 255, 258, 100_000]),
    spread=st.sampled_from([1e-3, 1.0, 30.0, 60_000.0]),
    seed=st.integers(0, 99),
)
def test_codes_equal_the_reference(
    rows: int, columns: int, dtype: torch.dtype, num_bits: int, scale: float, zero_point: int, spread: float, seed: int
) -> None:
    x = values((rows, columns), spread, seed).to(dtype)
    parameters = quantizer(scale, zero_point)
    assert torch.equal(quantize(x, *parameters, num_bits), reference.quantize(x, *parameters, num_bits))


@pytest.mark.parametrize("num_bits", [4, 8])
def test_reference_equals_the_grid(num_bits: int) -> None:
    x = values((64, 33), 4.0, seed=3)
    scale, zero_point = quantizer(0.0213, 9)
    unsigned = grid.quantize(x, scale, zero_point, grid.activation_grid(num_bits))
    assert torch.equal(reference.quantize(x, scale, zero_point, num_bits).float(), unsigned - 128)


@pytest.mark.parametrize("zero_point", [0, 1, 127, 128])
def test_halves_go_to_the_even_code(zero_point: int) -> None:
    x = (torch.arange(-600, 600) + 0.5) * 0.25
    codes = quantize(x, *quantizer(0.25, zero_point))
    even = torch.round(torch.arange(-600, 600) + 0.5) + zero_point
    assert torch.equal(codes.float(), even.clamp(0, 255) - 128)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_infinities_saturate() -> None:
    x = torch.tensor([float("-inf"), float("inf"), 3e38, -3e38])
    assert quantize(x, *quantizer(0.1, 100)).tolist() == [-128, 127, 127, -128]


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_is_within_one_code(dtype: torch.dtype) -> None:
    x = (torch.arange(-40_000, 40_000, 7) / 1000).to(dtype)
    parameters = quantizer(0.0317, 9)
    difference = silu_quantize(x, *parameters).int() - reference.silu_quantize(x, *parameters).int()
    assert difference.abs().max() <= 1
    assert difference.ne(0).float().mean() < 0.005


def layouts() -> list[Tensor]:
    image = values((2, 24, 5, 7), 2.0, seed=5).contiguous(memory_format=torch.channels_last)
    return [
        image,
        image.contiguous(),
        image[:, 3:16],
        image.permute(2, 0, 3, 1),
        values((3, 6, 10), 2.0, seed=6),
        values((30, 12), 2.0, seed=6)[:, 2:9],
        values((30,), 2.0, seed=6)[::2],
        values((6, 8), 2.0, seed=6)[:, 2:3],
        values((4, 3, 8), 2.0, seed=6)[:, 1:2],
        values((120,), 2.0, seed=6).as_strided((1, 3, 4, 5), (7, 20, 5, 1)),
        torch.tensor(0.3),
        torch.empty(0, 4),
    ]


@pytest.mark.parametrize("x", layouts(), ids=lambda x: f"{tuple(x.shape)}-{x.stride()}")
def test_layouts(x: Tensor) -> None:
    parameters = quantizer(0.03, 77)
    codes = quantize(x, *parameters)
    assert torch.equal(codes, reference.quantize(x.contiguous(), *parameters))
    with FakeTensorMode() as mode:
        assert quantize(*map(mode.from_tensor, (x, *parameters))).shape == x.shape, "torch.compile refuses none of them"
    if x.ndim == 4 and x.stride(1) == 1:
        assert codes.is_contiguous(memory_format=torch.channels_last)
    elif x.numel() == x.untyped_storage().nbytes() // 4:
        assert codes.stride() == x.stride()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3, dtype=torch.int8), *quantizer(1.0, 0)), TypeError, "float16, bfloat16 or float32"),
        ((torch.zeros(3), torch.tensor(1.0).double(), quantizer(1.0, 0)[1]), TypeError, "float32 scales"),
        ((torch.zeros(3), torch.ones(2), torch.zeros(2, dtype=torch.int32)), ValueError, "1 scale"),
        ((torch.zeros(3), *quantizer(1.0, 0), 9), ValueError, "2 to 8 bits"),
        ((torch.zeros(4, 6)[:, ::2], *quantizer(1.0, 0)), ValueError, "dense"),
    ],
)
def test_refusals(arguments: tuple[Tensor, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantize(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("x", layouts()[:6], ids=lambda x: f"{tuple(x.shape)}-{x.stride()}")
@pytest.mark.parametrize("silu", [False, True])
def test_registration(x: Tensor, silu: bool) -> None:
    torch.library.opcheck(torch.ops.edadm.quantize.default, (x, *quantizer(0.03, 77), 8, silu))


@pytest.mark.parametrize(("first", "second"), [(320, 320), (32, 16), (5, 3), (2, 12)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_images_are_quantized_as_one(first: int, second: int, dtype: torch.dtype) -> None:
    images = [
        values((2, 5, 3, channels), 2.0, seed=channels).to(dtype).permute(0, 3, 1, 2) for channels in (first, second)
    ]
    parameters = quantizer(0.0371, 127)
    expected = reference.quantize(torch.cat(images, dim=1), *parameters, 8)
    codes = quantize_joined(images[0], images[1], *parameters)
    assert codes.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(codes, expected)
    with pytest.raises(ValueError, match="more channels of the same images"):
        quantize_joined(images[0], images[1][:1], *parameters)
    with pytest.raises(ValueError, match="channels-last strides"):
        quantize_joined(images[0].contiguous(), images[1], *parameters)
