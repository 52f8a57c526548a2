"""A LoRA on the CUDA engine: the sums of PEFT's side branches, weighted without compiling again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import nn
from torch.nn.functional import conv2d

from edadm_cli.calibrate.nearest import quantize_to_nearest
from edadm_cli.config import BitWidth
from edadm_cli.engines.adapters import strengths_of, take_adapters
from edadm_cli.engines.base import EngineOptions
from edadm_cli.engines.cuda import CudaEngine
from edadm_cli.engines.parity import relative_l2
from edadm_cli.engines.reference import use_arithmetic
from edadm_cli.integrations.methods import bind_methods
from edadm_cli.models.denoiser_calls.predictions import prediction_of
from edadm_cli.models.example_calls import example_call
from edadm_cli.recipe import load_recipe

peft = pytest.importorskip("peft")
CPU = EngineOptions(device=torch.device("cpu"))
# Each kind of layer alone is equal to the bit. Together, sums in another order change some codes by one,
# which is much in a network of 8 to 16 channels, and far from what a misplaced adapter does.
TURNED = 0.03


def _flux() -> nn.Module:
    return FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def _add(denoiser: Any, name: str, targets: list[str], seed: int) -> None:
    denoiser.add_adapter(peft.LoraConfig(r=3, lora_alpha=3, target_modules=targets), name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in denoiser.named_parameters():
            if f".{name}." in key:
                parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(params=["tiny_sd", "flux"])
def network(request: pytest.FixtureRequest) -> Any:
    """A quantized denoiser with two adapters, and a call of it."""
    if request.param == "flux":
        torch.manual_seed(0)
        denoiser: Any = _flux().eval()
        targets = ["to_q", "to_v", "proj_out", "ff.net.2"]
    else:
        folder: Path = request.getfixturevalue("tiny_sd")
        denoiser = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
        # of one fused block some layers and some not; a float layer (conv_in); a split one; a strided convolution
        targets = ["to_q", "to_v", "to_out.0", "ff.net.2", "conv1", "conv_shortcut", "conv_in", "downsamplers.0.conv"]
    call = example_call(denoiser, batch_size=2)
    quantize_to_nearest(denoiser, load_recipe("rtn"), BitWidth.parse("w8a8"), [call])
    bind_methods(denoiser)
    _add(denoiser, "first", targets, 1)
    _add(denoiser, "second", ["to_k", "to_q", "to_out.0"], 2)
    return denoiser.requires_grad_(False), call


def _expected(denoiser: nn.Module, call: Any) -> torch.Tensor:
    with torch.no_grad():
        return prediction_of(denoiser(*call[0], **call[1]))


def test_adapters_are_weighted_on_the_engine_that_was_compiled_once(network: Any) -> None:
    denoiser, call = network
    use_arithmetic(denoiser, "integer")
    denoiser.set_adapters(["first"], 1.0)
    compiled = CudaEngine().compile(denoiser, *call, CPU)
    predictions = []
    for names, weights in [(["first"], [1.0]), (["first", "second"], [1.5, 0.7]), (["second"], [4.0])]:
        denoiser.set_adapters(names, weights)
        compiled.set_strengths(strengths_of(denoiser))
        predictions.append(_expected(denoiser, call))
        assert relative_l2(prediction_of(compiled(*call[0], **call[1])), predictions[-1]) < TURNED
    denoiser.disable_adapters()
    compiled.set_strengths(strengths_of(denoiser))
    bare = _expected(denoiser, call)
    assert relative_l2(prediction_of(compiled(*call[0], **call[1])), bare) < TURNED
    assert min(relative_l2(prediction, bare) for prediction in predictions) > 2 * TURNED


def test_layers_with_adapters_stay_in_integers(network: Any) -> None:
    denoiser, call = network
    layers = CudaEngine().compile(denoiser, *call, CPU).layers
    denoiser.unload_lora()
    assert layers == CudaEngine().compile(denoiser, *call, CPU).layers


@torch.no_grad()
def test_a_dilated_convolution_dilates_its_adapter_too(tiny_sd: Path) -> None:
    denoiser: Any = UNet2DConditionModel.from_pretrained(tiny_sd / "unet").eval()
    name = "mid_block.resnets.0.conv1"
    convolution = denoiser.get_submodule(name)
    convolution.dilation = convolution.padding = (2, 2)
    quantize_to_nearest(denoiser, load_recipe("rtn"), BitWidth.parse("w8a8"), [example_call(denoiser, batch_size=1)])
    bind_methods(denoiser)
    base = denoiser.get_submodule(name)
    _add(denoiser, "first", [name], 1)
    wrapper: Any = denoiser.get_submodule(name)
    down, up = wrapper.lora_A["first"].weight, wrapper.lora_B["first"].weight
    x = torch.randn(2, down.shape[1], 8, 8)
    added = conv2d(conv2d(x, down, padding=2, dilation=2), up)
    torch.testing.assert_close(wrapper(x), base(x) + added)
    branch = take_adapters(denoiser)[1][name]
    branch.set_strengths(strengths_of(denoiser))
    torch.testing.assert_close(branch(x), added, atol=1e-5, rtol=1e-5)
