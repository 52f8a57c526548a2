"""GroupNorm and LayerNorm to codes: within one code of statistics in float64, through Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edadm_kernels import (
    group_norm,
    group_norm_quantize,
    group_norm_to_codes,
    layer_norm_quantize,
    modulated_norm_quantize,
    reference,
)
from edadm_kernels.norm_plans import CHUNK_ROWS, CHUNKS, group_plan, layer_plan
from edadm_kernels.pack import CODE_OFFSET

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SCALES = [0.0313, 0.011, 0.25]
ZERO_POINTS = [128, 3, 255]
KINDS = ["normal", "shifted", "constant", "large", "outlier"]


def state(shape: tuple[int, ...], kind: str, dtype: torch.dtype, seed: int) -> Tensor:
    """Values that a float32 sum could lose: far from zero, equal, near float16's end, one far from the rest."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if kind == "shifted":
        x = x + 50
    elif kind == "constant":
        x = torch.full(shape, 3.3)
    elif kind == "large":
        x = x.clamp(-3, 3) * 20_000
    elif kind == "outlier":
        x[..., :1] = 1000.0
        x = x.flip(-1) if seed % 2 else x
    return x.to(dtype)


def affine(channels: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(channels, generator=generator), torch.randn(channels, generator=generator)


def quantizers(count: int) -> tuple[Tensor, Tensor]:
    return torch.tensor(SCALES[:count]), torch.tensor(ZERO_POINTS[:count], dtype=torch.int32)


def assert_close(actual: list[Tensor], target: list[Tensor], mismatches: float = 1.0) -> None:
    """One code apart at most: float32 errs by under 2^-20 |mean| / sqrt(var + eps) |weight|, a tenth of a code."""
    assert len(actual) == len(target)
    for codes, expected in zip(actual, target, strict=True):
        assert codes.ndim < 4 or codes.is_contiguous(memory_format=torch.channels_last)
        difference = (codes.int() - expected.int()).abs()
        assert difference.max() <= 1
        assert difference.float().mean() <= mismatches


def group_norm_codes(
    shape: tuple[int, int, int, int],
    groups: int,
    *,
    silu: bool = False,
    count: int = 1,
    kind: str = "normal",
    dtype: torch.dtype = torch.float16,
    num_bits: int = 8,
    seed: int = 0,
) -> tuple[list[Tensor], list[Tensor]]:
    """Codes of the kernel and of the reference."""
    samples, channels, height, width = shape
    rows = state((samples, height, width, channels), kind, dtype, seed)
    arguments = (rows.permute(0, 3, 1, 2), *affine(channels, seed), groups, 1e-5, silu, *quantizers(count), num_bits)
    return group_norm_quantize(*arguments), reference.group_norm_quantize(*arguments)


@settings(max_examples=40)
@given(
    samples=st.integers(1, 2),
    groups=st.integers(1, 5),
    group_channels=st.integers(1, 12),
    height=st.integers(1, 17),
    width=st.integers(1, 17),
    silu=st.booleans(),
    count=st.integers(1, 3),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_group_norm_of_any_size(
    samples: int,
    groups: int,
    group_channels: int,
    height: int,
    width: int,
    silu: bool,
    count: int,
    kind: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    shape = (samples, groups * group_channels, height, width)
    assert_close(*group_norm_codes(shape, groups, silu=silu, count=count, kind=kind, dtype=dtype, seed=seed))


THREE_KERNELS = [
    ((1, 320, 20, 20), 32),
    ((1, 60, 31, 17), 2),
    ((1, 51, 37, 21), 3),
    ((1, 160, 24, 24), 2),
    ((1, 24, 50, 43), 2),
]


# every kind of values on one of them, and each of the others with another kind
@pytest.mark.parametrize(
    ("shape", "groups", "kind"),
    [(*THREE_KERNELS[1], kind) for kind in KINDS]
    + [(*case, kind) for case, kind in zip(THREE_KERNELS[:1] + THREE_KERNELS[2:], KINDS, strict=False)],
)
def test_group_norm_in_three_kernels(shape: tuple[int, int, int, int], groups: int, kind: str) -> None:
    assert not group_plan(shape[2] * shape[3], shape[1], groups).fused
    assert_close(*group_norm_codes(shape, groups, silu=kind == "normal", kind=kind), mismatches=0.005)


def test_chunks_grow_instead_of_their_number() -> None:
    assert group_plan(50 * 86, 24, 2).rows_per_chunk == 2 * CHUNK_ROWS
    for rows in (1, 64, 2048, 2049, 4096, 16384):
        plan = group_plan(rows, 320, 32)
        assert plan.num_chunks <= CHUNKS
        assert (plan.num_chunks - 1) * plan.rows_per_chunk < rows <= plan.num_chunks * plan.rows_per_chunk


@pytest.mark.parametrize("channels", [320, 640, 960, 1280, 1920, 2560])
def test_blocks_of_groups_start_on_16_bytes(channels: int) -> None:
    for rows in (64, 256, 1024, 4096):
        plan = group_plan(rows, channels, 32)
        assert plan.groups_per_block * plan.group_channels % 8 == 0
        assert plan.group_blocks * plan.groups_per_block >= 32


@pytest.mark.parametrize("shape", [(3, 40, 6, 5), (3, 40, 40, 20)], ids=["one-kernel", "three-kernels"])
def test_a_sample_does_not_see_its_batch(shape: tuple[int, int, int, int]) -> None:
    x = state((3, *shape[2:], 40), "normal", torch.float16, seed=1).permute(0, 3, 1, 2)
    arguments = (*affine(40, seed=1), 4, 1e-5, True, *quantizers(1))
    together = group_norm_quantize(x, *arguments)[0]
    assert torch.equal(group_norm_quantize(x[1:2], *arguments)[0], together[1:2])


def test_two_images_are_one_whose_channels_follow() -> None:
    x, more = (state((2, 6, 5, c), "normal", torch.float16, seed=c).permute(0, 3, 1, 2) for c in (24, 16))
    arguments = (*affine(40, seed=1), 4, 1e-5, True, *quantizers(2), 8)
    joined = torch.cat([x, more], dim=1).contiguous(memory_format=torch.channels_last)
    actual, target = group_norm_quantize(x, *arguments, more), group_norm_quantize(joined, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(actual, target, strict=True))
    assert all(codes.is_contiguous(memory_format=torch.channels_last) for codes in actual)
    for other, message in (
        (more.float(), "more channels of the same images are expected"),
        (more[:, :, :5].contiguous(memory_format=torch.channels_last), "more channels of the same images are expected"),
        (more[:, :8].contiguous(memory_format=torch.channels_last), r"\[32\] are expected|32"),
        (more.contiguous(), "channels-last strides"),
    ):
        with pytest.raises(ValueError, match=message):
            group_norm_quantize(x, *arguments, other)


@pytest.mark.parametrize("joined", [False, True])
def test_the_last_quantizer_may_take_the_input_as_it_is(joined: bool) -> None:
    x, more = (state((2, 6, 5, c), "normal", torch.float16, seed=c).permute(0, 3, 1, 2) for c in (24, 16))
    whole = torch.cat([x, more], dim=1) if joined else x
    channels, images = whole.shape[1], (x, more if joined else None)
    scales, zero_points = quantizers(3)
    arguments = (*affine(channels, seed=1), 4, 1e-5, True)
    actual = group_norm_quantize(images[0], *arguments, scales, zero_points, 8, images[1], True)
    target = reference.group_norm_quantize(images[0], *arguments, scales, zero_points, 8, images[1], True)
    assert_close(actual[:2], target[:2], mismatches=0.01)
    assert_close(actual[:2], group_norm_quantize(images[0], *arguments, scales[:2], zero_points[:2], 8, images[1]))
    for codes in (actual[2], target[2]):
        assert torch.equal(codes, reference.quantize(whole, scales[2], zero_points[2]))
    with pytest.raises(ValueError, match="one of the input as it is are expected, found one"):
        group_norm_quantize(x, *affine(24, seed=1), 4, 1e-5, True, *quantizers(1), 8, None, True)


@pytest.mark.parametrize("misplaced", [1, 2, 6, 7], ids=["weight", "bias", "scales", "zero-points"])
def test_tensors_of_two_devices_are_refused(misplaced: int) -> None:
    x = state((1, 4, 4, 16), "normal", torch.float16, seed=1).permute(0, 3, 1, 2)
    arguments: list[Any] = [x, *affine(16, seed=1), 4, 1e-5, True, *quantizers(1)]
    arguments[misplaced] = arguments[misplaced].to("meta")
    with pytest.raises(ValueError, match="tensors on one device are expected, found cpu and meta"):
        group_norm_quantize(*arguments)


def test_codes_keep_to_their_bits() -> None:
    actual, target = group_norm_codes((1, 16, 9, 9), 4, num_bits=4)
    assert_close(actual, target, mismatches=0.005)
    assert actual[0].min() >= -128
    assert actual[0].max() <= 15 - 128


@settings(max_examples=40)
@given(
    rows=st.integers(1, 40),
    channels=st.integers(1, 200),
    count=st.integers(1, 3),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_layer_norm_of_any_size(rows: int, channels: int, count: int, kind: str, dtype: torch.dtype, seed: int) -> None:
    arguments = (state((rows, channels), kind, dtype, seed), *affine(channels, seed), 1e-5, *quantizers(count))
    assert_close(layer_norm_quantize(*arguments), reference.layer_norm_quantize(*arguments))


@pytest.mark.parametrize("channels", [320, 640, 768, 1024, 1280])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_of_real_widths(channels: int, dtype: torch.dtype) -> None:
    x = state((2, 11, channels), "normal", dtype, seed=2)
    arguments = (x, *affine(channels, seed=2), 1e-5, *quantizers(3))
    assert_close(layer_norm_quantize(*arguments), reference.layer_norm_quantize(*arguments), mismatches=0.005)
    for plan in (layer_plan(channels), layer_plan(channels, 90)):
        assert plan.head + plan.tail == channels


@pytest.mark.parametrize(("tokens", "channels"), [(5, 72), (4, 1152), (3, 40), (1, 73), (2, 1)])
@pytest.mark.parametrize(("bits", "dtype"), [(8, torch.float16), (4, torch.bfloat16)])
def test_adaptive_norm_takes_each_samples_scale_and_shift(
    tokens: int, channels: int, bits: int, dtype: torch.dtype
) -> None:
    x = state((2, tokens, channels), "shifted", dtype, seed=3)
    rows = torch.randn(2, 3 * channels, generator=torch.Generator().manual_seed(3)).half()
    modulation = rows[:, :channels], rows[:, 2 * channels :]
    arguments = (x, *modulation, 1e-6, torch.tensor(31.0), torch.tensor(-20.0), bits)
    assert_close([modulated_norm_quantize(*arguments)], [reference.modulated_norm_quantize(*arguments)])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"scale": torch.zeros(2, 8, dtype=torch.int32)}, TypeError),
        ({"inverse_scale": torch.tensor(2)}, TypeError),
        ({"code_shift": torch.zeros((), dtype=torch.int32)}, TypeError),
        ({"inverse_scale": torch.ones(8)}, ValueError),
        ({"shift": torch.zeros(1, 8)}, ValueError),
    ],
)
def test_adaptive_norm_refuses_what_its_kernel_would_misread(change: dict[str, Tensor], error: type[Exception]) -> None:
    rows = {"scale": torch.zeros(2, 8), "shift": torch.zeros(2, 8)}
    grid = {"inverse_scale": torch.tensor(31.0), "code_shift": torch.tensor(-20.0)}
    arguments: dict[str, Any] = {"x": torch.zeros(2, 3, 8), **rows, "eps": 1e-6, **grid, **change}
    with pytest.raises(error, match="expected, found"):
        modulated_norm_quantize(**arguments)


def group_arguments(x: Tensor, groups: int = 2) -> tuple[object, ...]:
    return (x, torch.ones(8), torch.zeros(8), groups, 1e-5, True, *quantizers(2), 8)


def image() -> Tensor:
    return torch.randn(2, 8, 3, 3, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", [(2, 8, 3, 5), (1, 6, 1, 1), (3, 4, 1, 7)])
def test_group_norm_of_floats_keeps_the_layout(shape: tuple[int, ...], silu: bool) -> None:
    x = state(shape, "normal", torch.float32, seed=4).contiguous(memory_format=torch.channels_last)
    weight, bias = affine(shape[1], seed=4)
    y = torch.nn.functional.group_norm(x.double(), 2, weight.double(), bias.double(), 1e-5)
    target = torch.nn.functional.silu(y) if silu else y
    actual = group_norm(x, weight, bias, 2, 1e-5, silu)
    assert actual.stride() == x.stride()
    assert actual.data_ptr() != x.data_ptr()
    assert torch.allclose(actual.double(), target, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (group_arguments(image().contiguous()), "channels-last"),
        (group_arguments(image(), groups=3), "divides 8"),
        (group_arguments(torch.zeros(1, 4, 3, 3).to(memory_format=torch.channels_last)), r"shape \(4,\)"),
        ((image(), torch.ones(16)[::2], *group_arguments(image())[2:]), "contiguous weight and bias"),
        ((*group_arguments(image())[:6], torch.ones(4)[::2], *quantizers(2)[1:], 8), "contiguous scales"),
    ],
)
def test_refusals_of_group_norm(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_norm_quantize(*arguments)  # type: ignore[arg-type]


def test_an_image_whose_offsets_do_not_fit_is_refused() -> None:
    arguments: list[Any] = [t.to("meta") if isinstance(t, Tensor) else t for t in group_arguments(image())[1:]]
    small, large = (
        torch.empty(2, 8, height, 1 << 14, device="meta", memory_format=torch.channels_last)
        for height in (1 << 12, 1 << 14)
    )
    assert group_norm_quantize(small, *arguments)[0].shape == small.shape
    with pytest.raises(ValueError, match="images of at most"):
        group_norm_quantize(large, *arguments)


def test_refusals_of_layer_norm() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        layer_norm_quantize(torch.zeros(4, 8).t(), torch.ones(4), torch.zeros(4), 1e-5, *quantizers(1))
    with pytest.raises(ValueError, match="1 to 3"):
        layer_norm_quantize(torch.zeros(4, 8), torch.ones(8), torch.zeros(8), 1e-5, torch.ones(4), torch.ones(4).int())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 40, 6, 5), 4), THREE_KERNELS[1]], ids=["one-kernel", "three-kernels"]
)
def test_group_norm_with_the_quantizer_of_a_loaded_layer(
    shape: tuple[int, int, int, int], groups: int, dtype: torch.dtype
) -> None:
    samples, channels, height, width = shape
    x = state((samples, height, width, channels), "normal", torch.float16, 0).permute(0, 3, 1, 2)
    weight, bias = (vector.to(dtype) for vector in affine(channels, 0))
    scales, zero_points = quantizers(1)
    arguments = (x, weight, bias, groups, 1e-5, True)
    ends = (scales.reciprocal(), zero_points.float() - CODE_OFFSET, 8)
    codes = group_norm_to_codes(*arguments, *ends)
    assert_close([codes], [reference.group_norm_to_codes(*arguments, *ends)], mismatches=0.01)
    assert torch.equal(codes, group_norm_quantize(*arguments, scales, zero_points)[0])
    halves = [part.contiguous(memory_format=torch.channels_last) for part in x.split([8, channels - 8], dim=1)]
    assert torch.equal(codes, group_norm_to_codes(halves[0], *arguments[1:], *ends, halves[1]))
