"""Normalization and quantization kernels on CUDA, on the shapes of Stable Diffusion 1.x, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from edadm_kernels import (
    backend,
    group_norm,
    group_norm_quantize,
    group_norm_to_codes,
    layer_norm_quantize,
    modulated_norm_quantize,
    norm_launch,
    quantize,
    quantize_joined,
    silu_quantize,
)
from edadm_kernels.norm_plans import LayerPlan, layer_plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
GROUP_SHAPES = [(64, 320), (64, 960), (32, 640), (32, 1920), (16, 640), (16, 1280), (16, 2560), (8, 1280), (8, 2560)]


def normal(*shape: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device="cuda")


def quantizers(count: int) -> tuple[Tensor, Tensor]:
    scales = torch.tensor([0.0313, 0.011, 0.25][:count], device="cuda")
    return scales, torch.tensor([128, 3, 255][:count], dtype=torch.int32, device="cuda")


def assert_close(actual: list[Tensor], target: list[Tensor]) -> None:
    """One code apart at most, and seldom: float32 statistics and fast division move few values over a boundary."""
    for codes, expected in zip(actual, target, strict=True):
        assert codes.stride() == expected.stride()
        difference = (codes.int() - expected.int()).abs()
        assert difference.max() <= 1
        assert difference.float().mean() < 0.002


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "channels"), GROUP_SHAPES)
def test_group_norm(size: int, channels: int, dtype: torch.dtype) -> None:
    x = normal(2, size, size, channels).add_(3).to(dtype).permute(0, 3, 1, 2)
    for silu, count in ((True, 1), (False, 3)):
        arguments = (x, normal(channels), normal(channels), 32, 1e-5, silu, *quantizers(count))
        with backend("reference"):
            target = group_norm_quantize(*arguments)
        assert_close(group_norm_quantize(*arguments), target)


JOINED_SHAPES = [(64, 640, 320), (64, 320, 320), (32, 1280, 640), (32, 640, 320), (16, 1280, 1280), (16, 1280, 640)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "first", "second"), [*JOINED_SHAPES, (8, 1280, 1280)])
def test_group_norm_of_two_images(size: int, first: int, second: int, dtype: torch.dtype) -> None:
    x, more = (normal(2, size, size, c).add_(3).to(dtype).permute(0, 3, 1, 2) for c in (first, second))
    for silu, count in ((True, 1), (False, 2)):
        arguments = (normal(first + second), normal(first + second), 32, 1e-5, silu, *quantizers(count), 8)
        with backend("reference"):
            target = group_norm_quantize(torch.cat([x, more], dim=1), *arguments)
        assert_close(group_norm_quantize(x, *arguments, more), target)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "first", "second"), [*JOINED_SHAPES, (8, 1280, 1280), (32, 640, 0), (128, 640, 320)])
def test_the_last_quantizer_takes_the_input_as_it_is(size: int, first: int, second: int, dtype: torch.dtype) -> None:
    x, more = (normal(2, size, size, c).add_(1).to(dtype).permute(0, 3, 1, 2) for c in (first, max(second, 8)))
    images, channels = (x, more) if second else (x, None), first + second
    arguments = (x, normal(channels), normal(channels), 32, 1e-5, True, *quantizers(2), 8, images[1], True)
    with backend("reference"):
        target = group_norm_quantize(*arguments)
    actual = group_norm_quantize(*arguments)
    assert_close(actual, target)
    assert torch.equal(actual[1], target[1])


@pytest.mark.parametrize(("size", "channels"), [(64, 320), (128, 320), (64, 640), (32, 1280), (16, 1280)])
def test_codes_of_a_sample_do_not_depend_on_its_batch(size: int, channels: int) -> None:
    """Blocks of a large batch go through several chunks of pixels."""
    x = normal(17, size, size, channels).add_(3).half().permute(0, 3, 1, 2)
    arguments = (normal(channels), normal(channels), 32, 1e-5, True, *quantizers(1))
    together = group_norm_quantize(x, *arguments)[0]
    for sample in (0, 8, 16):
        assert torch.equal(group_norm_quantize(x[sample : sample + 1], *arguments)[0], together[sample : sample + 1])
    with backend("reference"):
        target = group_norm_quantize(x[16:], *arguments)
    assert_close([together[16:]], target)


@pytest.mark.parametrize("affine", [torch.float16, torch.float32])
@pytest.mark.parametrize(("size", "first", "second"), [(64, 320, 0), (16, 1280, 0), (8, 1280, 0), *JOINED_SHAPES])
def test_group_norm_with_the_quantizer_of_a_loaded_layer(
    size: int, first: int, second: int, affine: torch.dtype
) -> None:
    x, more = (normal(2, size, size, c).add_(3).half().permute(0, 3, 1, 2) for c in (first, max(second, 8)))
    channels = first + second
    scales, zero_points = quantizers(1)
    ends = (normal(channels).to(affine), normal(channels).to(affine), 32, 1e-5, True)
    images = (x, more) if second else (x, None)
    arguments = (*ends, scales.reciprocal(), zero_points.float() - 128, 8, images[1])
    with backend("reference"):
        target = group_norm_to_codes(x, *arguments)
    assert_close([group_norm_to_codes(x, *arguments)], [target])


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("size", "channels"), GROUP_SHAPES)
def test_group_norm_of_float16(size: int, channels: int, silu: bool) -> None:
    x = normal(2, size, size, channels).add_(3).half().permute(0, 3, 1, 2)
    weight, bias = normal(channels), normal(channels)
    target = torch.group_norm(x.double(), 32, weight.double(), bias.double(), 1e-5)
    target = torch.nn.functional.silu(target) if silu else target
    actual = group_norm(x, weight, bias, 32, 1e-5, silu)
    assert actual.stride() == x.stride()
    assert float((actual.double() - target).norm() / target.norm()) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "channels"), [(8192, 320), (2048, 640), (512, 1280), (77, 768), (128, 1280)])
def test_layer_norm(rows: int, channels: int, dtype: torch.dtype) -> None:
    arguments = (normal(rows, channels).to(dtype), normal(channels), normal(channels), 1e-5, *quantizers(3))
    with backend("reference"):
        target = layer_norm_quantize(*arguments)
    assert_close(layer_norm_quantize(*arguments), target)


@pytest.mark.parametrize("shape", [(2, 4096, 1152), (2, 4096, 1536), (1, 4352, 3072), (3, 333, 1536), (2, 7, 40)])
def test_adaptive_norm(shape: tuple[int, int, int]) -> None:
    x, rows = (normal(*shape) * 3 + 1).half(), normal(shape[0], 4 * shape[2]).half()
    modulation = rows[:, : shape[2]], rows[:, -shape[2] :]
    arguments = (x, *modulation, 1e-6, torch.tensor(21.0, device="cuda"), torch.tensor(-9.0, device="cuda"))
    with backend("reference"):
        target = modulated_norm_quantize(*arguments)
    assert_close([modulated_norm_quantize(*arguments)], [target])


@pytest.mark.parametrize(
    ("channels", "rows", "warps"), [(320, 4, 1), (320, 8, 2), (640, 2, 1), (1280, 1, 1), (1536, 1, 1), (1536, 2, 2)]
)
def test_rows_that_are_divided_otherwise(channels: int, rows: int, warps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = layer_plan(channels)
    plan = LayerPlan(channels, usual.head, usual.tail, rows, warps)
    x = normal(2, 520, channels).add_(2).half()
    ends = (1e-5, *quantizers(1))
    of_rows = (x, normal(channels), normal(channels), *ends)
    of_samples = (x, normal(2, channels).half(), normal(2, channels).half(), 1e-5, 1 / ends[1], ends[2] - 128.0)
    with backend("reference"):
        target = [*layer_norm_quantize(*of_rows), modulated_norm_quantize(*of_samples)]
    monkeypatch.setattr(norm_launch, "layer_plan", lambda *_: plan)
    assert_close([*layer_norm_quantize(*of_rows), modulated_norm_quantize(*of_samples)], target)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 64, 64, 320), (3, 17, 5, 33)])
def test_quantize_is_exact(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scale, zero_point = quantizers(1)
    x = (normal(*shape) * 8).to(dtype).permute(0, 3, 1, 2)
    for view in (x, x[:, 8:24], x.contiguous()):
        with backend("reference"):
            target, wanted_silu = quantize(view, scale, zero_point), silu_quantize(view, scale, zero_point)
        assert torch.equal(quantize(view, scale, zero_point), target)
        assert_close([silu_quantize(view, scale, zero_point)], [wanted_silu])


def test_a_graph_replays_all_kernels() -> None:
    x = normal(2, 64, 64, 320).half().permute(0, 3, 1, 2)
    arguments = (x, normal(320), normal(320), 32, 1e-5, True, *quantizers(1))
    group_norm_quantize(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = group_norm_quantize(*arguments)[0]
    x.copy_(normal(2, 320, 64, 64))
    graph.replay()
    assert torch.equal(captured, group_norm_quantize(*arguments)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "first", "second"), [*JOINED_SHAPES, (5, 24, 8)])
def test_two_images_are_quantized_as_one(size: int, first: int, second: int, dtype: torch.dtype) -> None:
    x, more = (normal(2, size, size, c).to(dtype).permute(0, 3, 1, 2) for c in (first, second))
    arguments = (x, more, *quantizers(1))
    with backend("reference"):
        target = quantize_joined(*arguments)
    assert torch.equal(quantize_joined(*arguments), target)
