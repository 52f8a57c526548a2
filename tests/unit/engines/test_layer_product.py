"""Layers that multiply their own codes: equal to exact integers for every family, eager, compiled and by blocks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import edadm_kernels as kernels
from edadm_cli.engines.base import EngineOptions
from edadm_cli.engines.cuda import CudaEngine
from edadm_cli.engines.cuda.compiled.layer_product import KernelProduct
from edadm_cli.engines.cuda.products.layout import channels_last, quantizable
from edadm_cli.engines.parity import relative_l2
from edadm_cli.engines.reference import ReferenceEngine
from edadm_cli.models.denoiser_calls.predictions import prediction_of
from edadm_cli.quant.layers import QuantizedLayer, quantized_layer, quantized_layers
from edadm_cli.quant.network import deploy
from edadm_cli.quant.plan import LayerPlan
from tests.denoisers.families import FAMILIES, Call, quantized_denoiser, tiny_denoiser

CPU = EngineOptions(device=torch.device("cpu"))
ON_CPU = KernelProduct(("cpu",))
EXACT = 1e-5
# A normalization that Inductor or autograd decomposes rounds its last bit differently, which changes single codes.
COMPILED = 3e-2
FEWEST: dict[str, dict[str, Any]] = {"unet": {"up_block_types": ("UpBlock2D",)}}  # one block of each kind


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def exact(denoiser: nn.Module, call: Call) -> torch.Tensor:
    return prediction_of(ReferenceEngine().compile(denoiser, *call, CPU)(*call[0], **call[1]))


@pytest.mark.parametrize("family", ["unet", "flux"])
@torch.no_grad()
def test_a_deployed_denoiser_computes_exact_integers(family: str) -> None:
    denoiser, call = quantized_denoiser(family, "w4a6")
    expected = exact(denoiser, call)
    deploy(denoiser, ON_CPU)
    assert relative_l2(prediction_of(denoiser(*call[0], **call[1])), expected) < EXACT


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_deployed_denoiser_compiles_as_one_graph(family: str) -> None:
    denoiser, call = quantized_denoiser(family, **FEWEST.get(family, {}))
    expected = exact(denoiser, call)
    deploy(denoiser, ON_CPU)
    compiled = torch.compile(denoiser, fullgraph=True, backend="aot_eager")
    assert relative_l2(prediction_of(compiled(*call[0], **call[1])), expected) < COMPILED


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_cuda_engine_takes_every_family(family: str) -> None:
    denoiser, call = quantized_denoiser(family)
    expected, before = exact(denoiser, call), dict(denoiser.state_dict())
    compiled = CudaEngine().compile(denoiser, *call, CPU)
    assert relative_l2(prediction_of(compiled(*call[0], **call[1])), expected) < 1e-3
    assert all(row.is_met for row in compiled.layers if row.planned != "float")
    assert any(row.precision == "int8" for row in compiled.layers)
    after = denoiser.state_dict()
    assert all(tensor is before[name] or torch.equal(tensor, before[name]) for name, tensor in after.items())
    profile = compiled.profile(*call[0], **call[1])
    assert any(": " in row.name and row.precision == "int8" for row in profile), "layers are named"


@torch.no_grad()
def test_equal_blocks_share_their_compilation() -> None:
    """The three single blocks of a tiny Flux compile as often as those of full precision."""
    full, call = tiny_denoiser("flux", rows=1, num_single_layers=3)
    denoiser, _ = quantized_denoiser("flux", rows=1, num_single_layers=3)
    deploy(denoiser, ON_CPU)
    counts = []
    for model in (full, denoiser):
        torch._dynamo.reset()
        counter = CompileCounter()
        model.compile_repeated_blocks(fullgraph=True, backend=counter)  # type: ignore[operator]
        model(*call[0], **call[1])
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] < 4


@torch.no_grad()
def test_a_copy_shares_the_product_and_has_its_own_codes() -> None:
    denoiser, call = quantized_denoiser("dit")
    deploy(denoiser, ON_CPU)
    other = copy.deepcopy(denoiser)
    expected = prediction_of(denoiser(*call[0], **call[1]))
    for layer in quantized_layers(denoiser).values():
        layer.weight_codes.zero_()
    assert torch.equal(prediction_of(other(*call[0], **call[1])), expected)


@pytest.mark.parametrize("part", [np.s_[:, 1:4], np.s_[:, :, 1:], np.s_[:, :, :, 1:], np.s_[1:, :, 2:3]], ids=str)
def test_a_part_of_an_image_is_quantized_as_its_copy(part: Any) -> None:
    """A kernel reads evenly spaced pixels: a range of channels has them, a range of rows or columns has not."""
    image = channels_last(torch.randn(3, 6, 4, 5, generator=torch.Generator().manual_seed(0)))[part]
    grid = torch.tensor([0.03]), torch.tensor([7], dtype=torch.int32)
    codes = kernels.quantize(quantizable(image), *grid)
    assert codes.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(codes, kernels.quantize(image.contiguous(), *grid))


CONVOLUTION, LINEAR = nn.Conv2d(6, 10, 3, padding=1), nn.Linear(20, 12)


@pytest.mark.parametrize("weight_bits", [8, 4])
@pytest.mark.parametrize("module", [CONVOLUTION, LINEAR], ids=["conv2d", "linear"])
def test_files_and_memory_of_a_deployed_layer(module: nn.Module, weight_bits: int) -> None:
    """What is saved does not change, and codes that are not packed are held once."""
    layer = quantized_layer(module, LayerPlan(weight_bits=weight_bits, activation_bits=8))
    assert isinstance(layer, QuantizedLayer)
    shape = layer.weight_shape
    with torch.no_grad():
        layer.set_parameters(
            torch.randint(-8, 8, shape), torch.rand(shape[0]) + 0.1, torch.tensor(0.1), torch.tensor(3)
        )
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    deploy(layer, ON_CPU)
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and after[name].is_contiguous() for name in before)
    extra = sum(buffer.nbytes for name, buffer in layer.named_buffers() if name not in before and buffer.ndim > 1)
    assert extra == (layer.weight_int.numel() if weight_bits == 4 else 0) + (
        layer.product_correction.nbytes if len(shape) == 4 else 0  # type: ignore[operator, union-attr]
    )
    with torch.no_grad():
        layer(torch.randn(1, 6, 4, 4) if len(shape) == 4 else torch.randn(1, 20))
    assert layer._weight is None, "no float copy of the weight stays"


def test_tensors_that_change_are_prepared_again() -> None:
    layer = quantized_layer(nn.Linear(20, 12), LayerPlan(weight_bits=4, activation_bits=8))
    assert isinstance(layer, QuantizedLayer)
    deploy(layer, ON_CPU)
    x = torch.randn(3, 20)
    with torch.no_grad():
        layer.set_parameters(torch.randint(-8, 8, (12, 20)), torch.rand(12), torch.tensor(0.1), torch.tensor(128))
        actual = layer(x)
        other = quantized_layer(nn.Linear(20, 12), LayerPlan(weight_bits=4, activation_bits=8))
        deploy(other, ON_CPU)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(x), actual)
        layer.arithmetic = "integer"
        assert relative_l2(actual, layer(x)) < EXACT


def test_what_the_kernels_cannot_run_says_so_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.utils import logging

    from edadm_cli.integrations import notices

    monkeypatch.setattr(notices, "_said", set())
    logging.set_verbosity_warning()
    monkeypatch.setattr(logging.get_logger("diffusers"), "propagate", True)
    grouped = quantized_layer(nn.Conv2d(8, 8, 3, groups=4), LayerPlan(weight_bits=8, activation_bits=8))
    deploy(grouped, KernelProduct(("meta",)))
    grouped.to("meta")
    x = torch.randn(1, 8, 5, 5, device="meta")
    grouped(x)
    grouped(x)
    records = {id(record): record.message for record in caplog.records}  # one record, seen by two loggers' handlers
    assert list(records.values()) == [
        "Layers of this exported denoiser compute in floating point on meta: "
        "the kernels have no convolution in 4 groups."
    ]


@pytest.mark.parametrize("module", [CONVOLUTION, LINEAR], ids=["conv2d", "linear"])
@torch.no_grad()
def test_a_transform_of_the_input_is_part_of_the_product(module: nn.Module) -> None:
    plan = LayerPlan(weight_bits=8, activation_bits=8, transform="input-channel-scale")
    layer = quantized_layer(module, plan)
    assert isinstance(layer, QuantizedLayer)
    shape = layer.weight_shape
    scales = {"input_channel_scale": torch.rand(shape[1]) + 0.5}
    codes = torch.randint(-128, 128, shape)
    layer.set_parameters(codes, torch.rand(shape[0]) + 0.1, torch.tensor(0.05), torch.tensor(120), **scales)
    x = torch.randn(1, 6, 4, 4) if len(shape) == 4 else torch.randn(1, 20)
    deploy(layer, ON_CPU)
    assert layer.product is not None
    assert layer.product.runs(layer)
    actual = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    layer.arithmetic = "integer"
    assert relative_l2(actual, layer(x)) < EXACT
    assert relative_l2(compiled, layer(x)) < EXACT
