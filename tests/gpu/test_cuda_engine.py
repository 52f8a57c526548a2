"""The CUDA engine on CUDA: graphs, fused blocks and prompts against exact integer arithmetic on the same device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edadm_cli.calibrate.nearest import quantize_to_nearest
from edadm_cli.config import BitWidth
from edadm_cli.engines.base import EngineOptions
from edadm_cli.engines.cuda import CudaEngine
from edadm_cli.engines.parity import compare_layers, relative_l2
from edadm_cli.engines.reference import ReferenceEngine
from edadm_cli.models.random_models import example_call
from edadm_cli.recipe import RangeRecipe, Recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

Call = tuple[tuple[Any, ...], dict[str, Any]]
RECIPE = Recipe(name="test", ranges=RangeRecipe(weight="minmax", activation="minmax"))
CLASSES = {"tiny_sd": "UNet2DConditionModel", "tiny_ddpm": "UNet2DModel", "tiny_dit": "DiTTransformer2DModel"}
# In networks of 8 to 16 channels one code that is turned by another order of summation is felt: a float32 rest differs
# by a few such codes, a float16 rest by as much as quantization itself.
BOUNDS = {torch.float32: 3e-2, torch.float16: 1e-1}


@pytest.fixture(params=list(CLASSES))
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, Call]:
    import diffusers

    folder: Path = request.getfixturevalue(request.param)
    part = "transformer" if (folder / "transformer").exists() else "unet"
    denoiser = getattr(diffusers, CLASSES[request.param]).from_pretrained(folder / part)
    denoiser.eval().requires_grad_(False).cuda()
    call = example_call(denoiser, batch_size=2)
    quantize_to_nearest(denoiser, RECIPE, BitWidth.parse("w8a8"), [call])
    return denoiser, call


def options(dtype: torch.dtype = torch.float32) -> EngineOptions:
    return EngineOptions(device=torch.device("cuda"), rest_dtype=dtype)


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_a_recorded_step_is_close_to_exact_integers(network: tuple[nn.Module, Call], dtype: torch.dtype) -> None:
    denoiser, call = network
    exact = ReferenceEngine().compile(denoiser, *call, options())(*call[0], **call[1])[0]
    compiled = CudaEngine().compile(denoiser, *call, options(dtype))
    actual = compiled(*call[0], **call[1])[0]
    assert actual.is_cuda
    assert relative_l2(actual, exact) < BOUNDS[dtype]
    assert torch.equal(actual, compiled(*call[0], **call[1])[0]), "a replay repeats"
    assert torch.equal(actual, compiled.call_eagerly(*call[0], **call[1])[0])  # type: ignore[attr-defined]


def test_every_layer_is_within_its_bound(network: tuple[nn.Module, Call]) -> None:
    denoiser, call = network
    parity = compare_layers(CudaEngine(), denoiser, *call, options())
    # the recipe leaves the inputs of the first and the last layer in floating point
    assert set(parity.refused.values()) == {"its input stays in floating point"}
    assert len(parity.refused) == 2
    assert parity.worst[1] <= CudaEngine.layer_bound


@pytest.mark.parametrize("network", ["tiny_sd"], indirect=True)
def test_a_recorded_step_follows_its_inputs(network: tuple[nn.Module, Call]) -> None:
    denoiser, ((sample, timestep), kwargs) = network
    prompt = kwargs["encoder_hidden_states"]
    compiled = CudaEngine().compile(denoiser, (sample, timestep), kwargs, options(torch.float16))
    first = compiled(sample, timestep, encoder_hidden_states=prompt).sample
    kept = first.clone()
    others = [(sample, timestep - 300, prompt), (sample, timestep, prompt.flip(1)), (sample[:1], timestep, prompt[:1])]
    for x, t, states in others:
        actual = compiled(x, t, encoder_hidden_states=states).sample
        assert torch.equal(actual, compiled.call_eagerly(x, t, encoder_hidden_states=states).sample)  # type: ignore[attr-defined]
    assert torch.equal(first, kept), "a result outlives later calls"
    assert torch.equal(compiled(sample, timestep, encoder_hidden_states=prompt).sample, kept)


@pytest.mark.parametrize("network", ["tiny_sd"], indirect=True)
def test_the_profile_names_layers_and_kernels(network: tuple[nn.Module, Call]) -> None:
    denoiser, call = network
    rows = CudaEngine().compile(denoiser, *call, options(torch.float16)).profile(*call[0], **call[1])
    assert any(row.name.startswith("mid_block.resnets.0.conv1: ") and row.precision == "int8" for row in rows)
    assert sum(row.milliseconds for row in rows) > 0
