"""A pipeline whose denoiser runs on an engine generates what the denoiser itself generates."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from edadm_cli.calibrate.nearest import quantize_to_nearest
from edadm_cli.config import BitWidth
from edadm_cli.engines.base import EngineOptions
from edadm_cli.engines.pipeline import EngineDenoiser, put_on_engine
from edadm_cli.engines.reference import ReferenceEngine, use_arithmetic
from edadm_cli.errors import UsageError
from edadm_cli.models.denoiser_calls.call_templates import build_call
from edadm_cli.models.denoiser_calls.calls import DenoiserCall, record_calls
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.loading import load_model
from edadm_cli.models.pipeline_calls.parameters import takes_prompts
from edadm_cli.models.pipeline_calls.sampling import Samples, sample
from tests.denoisers.families import RECIPE

CPU = torch.device("cpu")


def sampled(model: LoadedModel) -> Samples:
    guidance = 2.0 if takes_prompts(model.pipeline) else None
    prompts = ["one"] if takes_prompts(model.pipeline) else None
    return sample(model, seeds=[3], prompts=prompts, num_steps=2, guidance_scale=guidance)


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_ddpm", "tiny_sdxl", "tiny_dit"])
def test_any_pipeline_generates_the_same_images(name: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(name)
    model = load_model(str(folder), CPU, torch.float32)
    calls: list[DenoiserCall] = []
    with record_calls(model.denoiser, calls.append):
        sampled(model)
    made: list[Any] = [build_call(call.template, call.sample, call.timestep, call.tensors) for call in calls[:1]]
    if name == "tiny_dit":  # a transformer takes one timestep per row
        made = [((args[0],), {**kwargs, "timestep": torch.full((2,), 5)}) for args, kwargs in made]
    quantize_to_nearest(model.denoiser, RECIPE, BitWidth.parse("w8a8"), made)
    use_arithmetic(model.denoiser, "integer")
    expected = sampled(model)
    compiled = ReferenceEngine().compile(model.denoiser, *made[0], EngineOptions(CPU))
    put_on_engine(model, compiled)
    actual = sampled(model)
    assert isinstance(model.denoiser, EngineDenoiser)
    assert torch.equal(actual.latents, expected.latents)
    assert torch.equal(actual.images, expected.images)


def test_the_stand_in_holds_no_weights_but_says_what_pipelines_ask(tiny_sdxl: Path) -> None:
    model = load_model(str(tiny_sdxl), CPU, torch.float16)
    before = model.denoiser
    width = before.add_embedding.linear_1.in_features
    stand_in = EngineDenoiser(before, ReferenceEngine())  # type: ignore[arg-type]
    assert sum(parameter.numel() for parameter in stand_in.parameters()) == 0
    assert (stand_in.dtype, stand_in.device) == (torch.float16, CPU)
    assert stand_in.config.in_channels == 4
    assert stand_in.add_embedding.linear_1.in_features == width
    assert before.conv_in.weight.device.type == "meta"
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = stand_in.no_such_thing


def test_what_would_change_a_prediction_comes_too_late(tiny_sd: Path) -> None:
    model = load_model(str(tiny_sd), CPU, torch.float32)
    stand_in = EngineDenoiser(model.denoiser, ReferenceEngine())  # type: ignore[arg-type]
    setattr(model.pipeline, model.denoiser_name, stand_in)
    for attempt in (
        lambda: model.pipeline.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
        lambda: stand_in.set_attn_processor(object()),
    ):
        with pytest.raises(UsageError, match=r"would change nothing: call it on the pipeline that the engine is given"):
            attempt()


def test_a_pipeline_inside_a_pipeline_gets_the_engine_too() -> None:
    """The combined pipeline of Kandinsky 2.2 samples with a decoder pipeline, which holds the denoiser as well."""
    denoiser: Any = nn.Linear(2, 2)
    inner = SimpleNamespace(unet=denoiser)
    outer: Any = SimpleNamespace(unet=denoiser, decoder_pipe=inner)
    model: Any = SimpleNamespace(pipeline=outer, denoiser_name="unet", denoiser=denoiser)
    compiled: Any = SimpleNamespace()
    put_on_engine(model, compiled)
    assert inner.unet is outer.unet
    assert isinstance(inner.unet, EngineDenoiser)
