"""Convolutions through Triton's interpreter: sums exact, floats equal to the reference, at every border."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from edadm_kernels import conv2d, reference
from edadm_kernels.conv_launch import Geometry, launch_conv
from edadm_kernels.pack import Padding, conv_border_table, pack_w4
from edadm_kernels.reference.products import accumulate_conv2d
from edadm_kernels.tiles import Tile
from tests.kernels.operands import random, random_codes

SAME: Padding = (1, 1, 1, 1)
DOWN: Padding = (0, 1, 0, 1)  # the asymmetric padding of diffusers' down-samplers
NONE: Padding = (0, 0, 0, 0)
SMALL = {"bm": 32, "bn": 32, "bk": 64, "num_warps": 4, "num_stages": 1}


class Layer:
    """Codes, packed where they have four bits, with all operands of the epilogue."""

    def __init__(
        self,
        height: int,
        width: int,
        channels: int = 20,
        outputs: int = 7,
        geometry: Geometry | None = None,
        *,
        zero_point: int = 77,
        packed: bool = False,
        seed: int = 0,
    ) -> None:
        self.geometry = geometry or Geometry(1, 3, 3, SAME)
        kernel = (self.geometry.kh, self.geometry.kw)
        self.x = random_codes(2, channels, height, width, seed=seed).contiguous(memory_format=torch.channels_last)
        codes = random_codes(outputs, *kernel, channels, seed=seed + 1, limit=8 if packed else 128)
        self.weight = pack_w4(codes) if packed else codes
        self.scale = random(outputs, seed=seed + 2).abs() * 1e-3
        self.correction = conv_border_table(codes, zero_point, self.geometry.padding)
        self.bias = random(outputs, seed=seed + 3)
        self.sample_bias = random(2, outputs, seed=seed + 4).half()
        self.options = {
            "stride": self.geometry.stride,
            "padding": self.geometry.padding,
            "upsample": self.geometry.upsample,
        }
        shape = reference.conv2d(*self.vectors(), **self.options).shape  # type: ignore[arg-type]
        self.residual = random(*shape, seed=seed + 5).half().contiguous(memory_format=torch.channels_last)

    def vectors(self) -> tuple[Tensor, ...]:
        return self.x, self.weight, self.scale, self.correction

    def everything(self) -> tuple[Tensor, ...]:
        return (*self.vectors(), self.bias, self.sample_bias, self.residual)

    def sums(self, tile: Tile) -> Tensor:
        """The sums `[N, O, H', W']` of a split product, from a poisoned buffer."""
        kept: list[Tensor] = []

        def poisoned(tile: Tile, m: int, n: int, device: torch.device) -> Tensor:
            kept.append(torch.full((tile.split_k, m, n), -(2**31), dtype=torch.int32))
            return kept[0]

        with pytest.MonkeyPatch.context() as patch:
            for module in ("conv_launch", "gemm_launch"):
                patch.setattr(f"edadm_kernels.{module}.partial_sums", poisoned)
            out = torch.empty_like(self.residual, dtype=torch.float32)
            launch_conv(tile, self.geometry, *self.vectors(), None, None, None, out)
        samples, outputs, height, width = self.residual.shape
        return kept[0].sum(0).reshape(samples, height, width, outputs).permute(0, 3, 1, 2)


@settings(max_examples=20)
@given(
    height=st.integers(1, 17),
    width=st.integers(1, 17),
    kernel=st.sampled_from([1, 3]),
    stride=st.sampled_from([1, 2]),
    padding=st.sampled_from([SAME, DOWN, NONE, (2, 0, 1, 2)]),
    upsample=st.booleans(),
    channels=st.sampled_from([4, 20, 64, 70]),
    zero_point=st.sampled_from([0, 77, 128, 255]),
)
def test_conv_of_any_size(
    height: int,
    width: int,
    kernel: int,
    stride: int,
    padding: Padding,
    upsample: bool,
    channels: int,
    zero_point: int,
) -> None:
    grown = 2 if upsample else 1
    assume(height * grown + padding[0] + padding[1] >= kernel and width * grown + padding[2] + padding[3] >= kernel)
    assume(height * width * grown**2 / stride**2 <= 80)
    geometry = Geometry(stride, kernel, kernel, padding, upsample)
    layer = Layer(height, width, channels, 3, geometry, zero_point=zero_point)
    actual = conv2d(*layer.everything(), **layer.options)
    expected = reference.conv2d(*layer.everything(), **layer.options)
    assert torch.equal(actual, expected)
    assert actual.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("taps_inner", [False, True])
@pytest.mark.parametrize("split_k", [2, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_sums_are_exact(taps_inner: bool, split_k: int, stride: int) -> None:
    layer = Layer(5, 6, 70, 35, Geometry(stride, 3, 3, SAME))
    actual = layer.sums(Tile(**SMALL, split_k=split_k, taps_inner=taps_inner))
    assert torch.equal(actual.double(), accumulate_conv2d(layer.x, layer.weight, stride, SAME, False))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("upsample", [False, True])
def test_sums_of_packed_weights_are_exact(kernel: int, upsample: bool) -> None:
    padding = SAME if kernel == 3 else NONE
    layer = Layer(3, 4, 64, 35, Geometry(1, kernel, kernel, padding, upsample), packed=True)
    actual = layer.sums(Tile(**SMALL, split_k=2))
    assert torch.equal(actual.double(), accumulate_conv2d(layer.x, layer.weight, 1, padding, upsample))


@pytest.mark.parametrize("taps_inner", [False, True])
@pytest.mark.parametrize("split_k", [1, 3])
@pytest.mark.parametrize("geometry", [Geometry(1, 3, 3, SAME, True), Geometry(2, 3, 3, DOWN), Geometry(1, 1, 1, NONE)])
def test_every_cut_gives_the_same(taps_inner: bool, split_k: int, geometry: Geometry) -> None:
    layer = Layer(*((2, 4) if geometry.upsample else (5, 4)), 130, 35, geometry)
    out = torch.full_like(layer.residual, float("nan"))
    tile = Tile(**SMALL, split_k=split_k, taps_inner=taps_inner, column_parts=2)
    launch_conv(tile, geometry, *layer.everything(), out)
    assert torch.equal(out, reference.conv2d(*layer.everything(), **layer.options))


@pytest.mark.parametrize("geometry", [Geometry(1, 3, 3, SAME), Geometry(2, 3, 3, DOWN), Geometry(1, 1, 1, NONE)])
@pytest.mark.parametrize("zero_point", [0, 255])
def test_packed_conv_equals_the_reference(geometry: Geometry, zero_point: int) -> None:
    layer = Layer(4, 5, 128, 6, geometry, zero_point=zero_point, packed=True)
    assert torch.equal(
        conv2d(*layer.everything(), **layer.options), reference.conv2d(*layer.everything(), **layer.options)
    )


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_element_types(out_dtype: torch.dtype) -> None:
    layer = Layer(4, 4)
    actual = conv2d(*layer.everything(), **layer.options, out_dtype=out_dtype)
    expected = reference.conv2d(*layer.everything(), **layer.options, out_dtype=out_dtype)
    assert actual.dtype == out_dtype
    # the interpreter truncates to bfloat16
    bound = 2**-7 if out_dtype == torch.bfloat16 else 0
    torch.testing.assert_close(actual.float(), expected.float(), rtol=bound, atol=0)


@pytest.mark.parametrize("x_code", [-128, 127])
def test_saturated_inputs(x_code: int) -> None:
    layer = Layer(3, 3, 64, 3, zero_point=255)
    layer.x.fill_(x_code)
    layer.weight.fill_(-128)
    layer.correction = conv_border_table(layer.weight, 255, SAME)
    actual = conv2d(*layer.vectors(), **layer.options, out_dtype=torch.float32)
    taps = torch.tensor([[4, 6, 4], [6, 9, 6], [4, 6, 4]])
    exact = (taps * 64 * -128 * (x_code + 128 - 255)).float()
    assert torch.equal(actual[1, 2], exact * layer.scale[2])


@pytest.mark.parametrize(
    ("geometry", "packed"),
    [(Geometry(2, 3, 3, DOWN), True), (Geometry(1, 1, 1, NONE), False)],
)
def test_registration(geometry: Geometry, packed: bool) -> None:
    layer = Layer(2, 3, 64, 5, geometry, packed=packed)
    tail = (geometry.stride, list(geometry.padding), geometry.upsample, torch.float16)
    torch.library.opcheck(torch.ops.edadm.conv2d.default, (*layer.everything(), *tail))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(2, 20, 4, 4, dtype=torch.int8)}, ValueError, "channels-last codes"),
        ({"weight": torch.zeros(7, 7, 7, 20, dtype=torch.int8)}, ValueError, "at most 5x5"),
        ({"weight": torch.zeros(7, 3, 3, 21, dtype=torch.int8)}, ValueError, "20 input channels"),
        ({"padding": (1, 1, 1)}, ValueError, "four paddings"),
        ({"padding": NONE}, ValueError, "correction of shape"),
        ({"stride": 0}, ValueError, "positive stride"),
        ({"sample_bias": torch.zeros(1, 7)}, ValueError, "sample_bias of shape"),
        ({"residual": torch.zeros(2, 7, 4, 4)}, ValueError, "channels-last residual"),
        ({"bias": torch.zeros(6)}, ValueError, "scale and bias"),
        ({"sample_bias": torch.zeros(2, 7, dtype=torch.int32)}, TypeError, "biases and residuals"),
        ({"out_dtype": torch.float64}, TypeError, "output is expected"),
    ],
)
def test_refusals(change: dict[str, object], error: type[Exception], text: str) -> None:
    layer = Layer(4, 4)
    names = ("x", "weight", "scale", "correction", "bias", "sample_bias", "residual")
    arguments = dict(zip(names, layer.everything(), strict=True)) | layer.options | change
    with pytest.raises(error, match=text):
        conv2d(**arguments)  # type: ignore[arg-type]
