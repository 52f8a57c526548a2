"""Samplers: what the denoiser receives, and the paths they take."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline
from torch import Tensor

from edadm_cli.artifacts import ModelRef
from edadm_cli.models.denoiser_calls.calls import DenoiserCall, record_calls
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.pipeline_calls.sampling import sample
from edadm_cli.models.random_models import build_random_pipeline
from edadm_cli.models.registry import ModelEntry, known_models
from edadm_cli.models.schedulers import QuadraticDDIMScheduler
from tests.unit.models.tiny import shrink_flux, shrunk


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_flux(monkeypatch)


def load(name: str, **changes: Any) -> LoadedModel:
    """A tiny random pipeline with the settings of its model."""
    pipeline = build_random_pipeline(shrunk(name), 0, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    entry: ModelEntry = known_models()[name].model_copy(update=changes)
    denoiser = "unet" if hasattr(pipeline, "unet") else "transformer"
    return LoadedModel(ModelRef(id=name, revision=None, fingerprint="0" * 64), entry, pipeline, denoiser, None)


def calls_of(model: LoadedModel, num_steps: int, **options: Any) -> list[DenoiserCall]:
    calls: list[DenoiserCall] = []
    with record_calls(model.denoiser, calls.append):
        sample(model, seeds=[1, 2], num_steps=num_steps, **{"prompts": None, "guidance_scale": None, **options})
    return calls


# The timesteps that each system's denoiser receives over four steps, in the scheduler's own units.
TIMESTEPS: dict[str, tuple[Any, ...]] = {
    "ldm-bedroom": (751, 501, 251, 1),
    "ldm-church": (751, 501, 251, 1),
    "ldm-imagenet": (751, 501, 251, 1),
    "sd15": (751, 501, 501, 251, 1),  # PLMS calls the denoiser once more
    "sd21": (751, 501, 251, 1),
    "sdxl": (751, 501, 251, 1),
    "dit-xl-2": (750, 500, 250, 0),
    "pixart-sigma": (999, 749, 500, 250),
    "sd3.5-medium": (1000.0, 857.7, 602.2, 8.93),  # 3 s / (1 + 2 s) between its largest and smallest value
    "flux-schnell": (1.0, 0.75, 0.5, 0.25),
}
WORDS = ("sd15", "sd21", "sdxl", "pixart-sigma", "sd3.5-medium", "flux-schnell")


@pytest.mark.parametrize("name", sorted(TIMESTEPS))
def test_timesteps_are_what_the_denoiser_receives(name: str) -> None:
    model = load(name)
    prompts = ["a cat", "a dog"] if name in WORDS else None
    calls = calls_of(model, 4, prompts=prompts, guidance_scale=model.entry.guidance_scale)
    actual = [call.timestep.item() for call in calls]
    assert actual == pytest.approx(list(TIMESTEPS[name]), rel=3e-3)
    is_guided = (model.entry.guidance_scale or 0) > 1
    assert {call.sample.shape[0] for call in calls} == {4 if is_guided else 2}


@pytest.mark.parametrize("name", sorted(TIMESTEPS))
def test_seeds_decide_the_images_whatever_the_batch(name: str) -> None:
    model = load(name, eta=1.0)
    prompts = ["a cat", "a dog"] if name in WORDS else None
    options: dict[str, Any] = {"num_steps": 3, "guidance_scale": model.entry.guidance_scale}
    together = sample(model, seeds=[5, 6], prompts=prompts, **options)
    alone = sample(model, seeds=[6], prompts=prompts and prompts[1:], **options)
    torch.testing.assert_close(together.latents[1:], alone.latents, atol=2e-3, rtol=2e-3)
    assert not torch.allclose(together.latents[0], together.latents[1], atol=1e-2)


def test_quadratic_timesteps_are_those_of_the_authors() -> None:
    scheduler = QuadraticDDIMScheduler()
    scheduler.set_timesteps(10)
    expected = [int(value) for value in torch.linspace(0, math.sqrt(800), 10, dtype=torch.float64) ** 2]
    assert scheduler.timesteps.tolist() == expected[::-1]
    assert expected[-1] in (799, 800)


def test_quadratic_steps_follow_the_equation() -> None:
    scheduler = QuadraticDDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(6)
    x, times = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), scheduler.timesteps.tolist()
    alphas = [float(scheduler.alphas_cumprod[t]) for t in times] + [1.0]
    for index, t in enumerate(times):
        noise = torch.sin(x + index)
        now, then = alphas[index], alphas[index + 1]
        clean = (x - math.sqrt(1 - now) * noise) / math.sqrt(now)
        expected = math.sqrt(then) * clean + math.sqrt(1 - then) * noise
        x = scheduler.step(noise, t, x).prev_sample
        torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)


def test_steps_that_coincide_change_nothing() -> None:
    scheduler = QuadraticDDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(100)
    times = scheduler.timesteps.tolist()
    assert times[-2:] == [0, 0]
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    for t in times[:-2]:
        x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
    again = scheduler.step(torch.cos(x), 0, x).prev_sample
    torch.testing.assert_close(again, x, atol=1e-5, rtol=1e-5)


def test_a_step_out_of_turn_is_an_error() -> None:
    scheduler = QuadraticDDIMScheduler()
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="not the next one"):
        scheduler.step(torch.zeros(1, 1), 5, torch.zeros(1, 1))


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_on_equal_timesteps_it_is_diffusers_own(prediction_type: str, eta: float) -> None:
    """From 500 to 0: the one step that the two spacings can have in common."""
    options: dict[str, Any] = {"prediction_type": prediction_type, "clip_sample": True, "num_train_timesteps": 1000}
    ours, theirs = QuadraticDDIMScheduler(**options), DDIMScheduler(**options, timestep_spacing="leading")
    theirs.set_timesteps(2)
    ours.set_timesteps(2)
    ours.timesteps = theirs.timesteps  # 500, 0
    generator = torch.Generator().manual_seed(3)
    x, output, noise = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(3))
    actual = ours.step(output, 500, x, eta=eta, variance_noise=noise)
    expected = theirs.step(output, 500, x, eta=eta, variance_noise=noise)
    torch.testing.assert_close(actual.prev_sample, expected.prev_sample, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual.pred_original_sample, expected.pred_original_sample, atol=1e-5, rtol=1e-5)


def test_a_pipeline_keeps_its_quadratic_scheduler_on_disk(tmp_path: Any) -> None:
    pipeline = build_random_pipeline(shrunk("ddpm-cifar10"), 0, torch.float32)
    pipeline.scheduler = QuadraticDDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is DDPMPipeline
    assert type(loaded.scheduler) is QuadraticDDIMScheduler
    images = [images_of(p) for p in (pipeline, loaded)]
    torch.testing.assert_close(*images, atol=1e-4, rtol=0)
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    assert not torch.allclose(images_of(pipeline), images[0], atol=1e-2)


def images_of(pipeline: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images: Tensor = pipeline(generator=generator, num_inference_steps=4, output_type="pt").images
    return images
