"""What a call multiplies and moves: the numbers of Stable Diffusion 1.5, equal for float and quantized denoisers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from edadm_cli.bench.workload import FORMS, WorkItem, macs_by_kind, unique_shapes, workload
from edadm_cli.calibrate.nearest import quantize_to_nearest
from edadm_cli.config import BitWidth
from edadm_cli.recipe import AttentionRecipe, LayerRule, Recipe

Call = tuple[tuple[Any, ...], dict[str, Any]]


@pytest.fixture
def call() -> Call:
    torch.manual_seed(0)
    return (torch.randn(2, 4, 8, 8), torch.tensor(7), torch.randn(2, 5, 16)), {}


def _total(items: list[WorkItem]) -> int:
    return sum(item.macs for item in items)


@pytest.fixture(scope="module")
def stable_diffusion() -> list[WorkItem]:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).eval()
        args = (torch.empty(1, 4, 64, 64), torch.empty((), dtype=torch.int64), torch.empty(1, 77, 768))
    return workload(unet, args, {})


def test_stable_diffusion_has_the_published_work(stable_diffusion: list[WorkItem]) -> None:
    actual = {kind: round(macs / 1e9, 1) for kind, macs in macs_by_kind(stable_diffusion).items()}
    assert actual == {
        "conv3x3": 200.2,
        "self_attention": 61.2,
        "geglu": 51.2,
        "attention_projection": 39.9,
        "feed_forward": 25.6,
        "conv1x1": 21.8,
        "cross_attention": 1.8,
        "linear": 0.0,
    }
    assert round(_total(stable_diffusion) / 1e9, 1) == 401.6
    assert max(item.k for item in stable_diffusion if item.is_integer) == 23_040
    integer = sum(item.macs for item in stable_diffusion if item.is_integer)
    assert round(integer / _total(stable_diffusion), 3) == 0.843


def test_every_weight_is_read_once(stable_diffusion: list[WorkItem]) -> None:
    """859.5 million parameters, as published; biases of the products are counted apart."""
    channels = sum(item.batch * item.n for item in stable_diffusion if item.macs and item.weights)
    weights = sum(item.weights for item in stable_diffusion)
    without_bias = sum(item.n for item in stable_diffusion if item.name.rsplit(".", 1)[-1] in ("to_q", "to_k", "to_v"))
    assert weights + channels - without_bias == 859_520_964


def test_meta_and_real_tensors_give_the_same_items(denoiser: nn.Module, call: Call) -> None:
    real = workload(denoiser, *call)
    on_meta = copy.deepcopy(denoiser).to("meta")
    args = tuple(tensor.to("meta") for tensor in call[0])
    assert workload(on_meta, args, call[1]) == real


def test_nothing_stays_on_the_denoiser(denoiser: nn.Module, call: Call) -> None:
    with pytest.raises(TypeError):
        workload(denoiser, call[0][:1], {})
    workload(denoiser, *call)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in denoiser.modules())


def test_work_grows_with_the_batch_and_weights_do_not(denoiser: nn.Module, call: Call) -> None:
    doubled = tuple(torch.cat([x, x]) if x.dim() else x for x in call[0])
    one, two = workload(denoiser, *call), workload(denoiser, doubled, {})
    assert _total(two) == 2 * _total(one)
    assert [item.weights for item in one] == [item.weights for item in two]


def test_a_quantized_denoiser_has_the_same_work_and_its_own_integers(denoiser: nn.Module, call: Call) -> None:
    plain = workload(denoiser, *call)
    recipe = Recipe(
        name="test",
        attention=AttentionRecipe(quantize=True),
        layers=(LayerRule(pattern="*.to_v", exclude=True), LayerRule(pattern="*.to_k", float_input=True)),
    )
    quantize_to_nearest(denoiser, recipe, BitWidth(weight=4, activation=8), [call])
    quantized = workload(denoiser, *call)
    assert macs_by_kind(quantized) == macs_by_kind(plain)
    assert {item.kind for item in quantized if ".part" in item.name} == {"conv1x1"}
    attention = {item.name: item for item in quantized if item.kind.endswith("_attention")}
    assert attention
    assert all(item.is_integer for item in attention.values())
    assert {name: item.macs for name, item in attention.items()} == {
        item.name: item.macs for item in plain if item.kind.endswith("_attention")
    }
    floating = {item.name.rsplit(".", 1)[-1] for item in quantized if item.macs and not item.is_integer}
    assert floating == {"conv_in", "conv_out", "to_v", "to_k"}


def test_attention_reads_queries_keys_values_and_writes_one_output(denoiser: nn.Module, call: Call) -> None:
    items = workload(denoiser, *call)
    cross = next(item for item in items if item.kind == "cross_attention")
    heads = cross.batch // 2
    assert (cross.m, cross.n) == (64, 5)
    assert cross.macs == 2 * cross.batch * cross.m * cross.n * cross.k
    assert cross.inputs == 2 * heads * cross.k * (64 + 5 + 5)
    assert cross.outputs == 2 * heads * cross.k * 64
    assert not cross.is_integer
    counted = workload(denoiser, *call, attention_in_integers=True)
    assert all(item.is_integer for item in counted if item.kind.endswith("_attention"))


def test_residuals_are_read_and_upsampling_is_free(denoiser: nn.Module, call: Call) -> None:
    kinds = {item.name: item for item in workload(denoiser, *call)}
    residual = kinds["down_blocks.0.resnets.0.add"]  # the last add of the block; the one before adds the timestep
    assert (residual.kind, residual.inputs, residual.outputs) == ("residual", 2 * 8 * 64, 0)
    assert kinds["up_blocks.0.upsamplers.0.upsample_nearest2d"].kind == "elementwise"


CONV = WorkItem("c", "conv3x3", 64, 8, 36, 1, 64 * 8 * 36, 256, 288, 512, True)


@pytest.mark.parametrize(
    ("item", "read", "written"),
    [
        (CONV, (2 * (256 + 288 + 8), 256 + 288 + 12 * 8, 256 + 144 + 12 * 8), (1024, 1024, 1024)),
        (WorkItem("g", "geglu", 4, 8, 2, 1, 64, 8, 16, 16, True), (64, 120, 112), (32, 16, 16)),
        (WorkItem("n", "norm", 0, 0, 0, 1, 0, 10, 4, 10, True), (28, 28, 28), (20, 10, 10)),
        (WorkItem("f", "linear", 4, 8, 2, 1, 64, 8, 16, 32, False), (64, 64, 64), (64, 64, 64)),
    ],
)
def test_bytes_by_hand(item: WorkItem, read: tuple[float, ...], written: tuple[float, ...]) -> None:
    assert tuple(item.bytes_read(form) for form in FORMS) == read
    assert tuple(item.bytes_written(form) for form in FORMS) == written
    assert item.bytes_moved("fp16") == read[0] + written[0]


def test_unique_shapes_lose_nothing(denoiser: nn.Module, call: Call) -> None:
    items = workload(denoiser, *call)
    shapes = unique_shapes(items)
    assert sum(shapes.values()) == len(items)
    assert sum(shape.macs * count for shape, count in shapes.items()) == _total(items)
    assert len(shapes) < len(items)
    assert not any(shape.name for shape in shapes)
