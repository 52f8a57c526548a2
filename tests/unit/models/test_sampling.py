"""Sampling any pipeline: seeds decide the images, batches do not."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from edadm_cli.artifacts import ModelRef
from edadm_cli.errors import InputError, MachineError, UsageError
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.loading import load_model
from edadm_cli.models.pipeline_calls.sampling import sample
from edadm_cli.models.pipeline_calls.seeds import CALIBRATION, EVALUATION, image_seed
from edadm_cli.models.pipeline_calls.watched_scheduler import watched_scheduler
from edadm_cli.models.registry import ModelEntry
from tests.denoisers.unets import consistency, deepfloyd, inpainting
from tests.denoisers.videos import stable_video

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stable_diffusion(tiny_sd: Path) -> LoadedModel:
    return load_model(str(tiny_sd), CPU, torch.float32)


@pytest.fixture(scope="module")
def pixels(tiny_ddpm: Path) -> LoadedModel:
    return load_model(str(tiny_ddpm), CPU, torch.float32)


@given(st.integers(0, 400), st.integers(0, 400), st.integers(0, 999_999), st.integers(0, 999_999))
def test_image_seeds_do_not_collide(seed: int, other_seed: int, index: int, other_index: int) -> None:
    keys = {(seed, index, CALIBRATION), (other_seed, other_index, CALIBRATION), (seed, index, EVALUATION)}
    assert len({image_seed(s, i, stream) for s, i, stream in keys}) == len(keys)


def test_images_follow_their_seeds_whatever_the_batch(stable_diffusion: LoadedModel) -> None:
    prompts = ["one", "two", "three"]
    together = sample(stable_diffusion, seeds=[1, 2, 3], prompts=prompts, num_steps=3, guidance_scale=2.0)
    alone = sample(stable_diffusion, seeds=[2], prompts=["two"], num_steps=3, guidance_scale=2.0)
    torch.testing.assert_close(together.latents[1:2], alone.latents, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together.latents[0], together.latents[1], atol=1e-2)


@pytest.mark.parametrize(
    ("name", "seeds", "hint"),
    [
        ("pixels", [1, 2], "a smaller --batch-size"),
        ("pixels", [1], None),
        ("stable_diffusion", [1], "edadm collect with a smaller --height and --width"),
    ],
)
def test_out_of_memory_says_what_takes_less(
    name: str, seeds: list[int], hint: str | None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: LoadedModel = request.getfixturevalue(name)

    def forward(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(model.denoiser, "forward", forward)
    prompts = ["one"] * len(seeds) if name == "stable_diffusion" else None
    with pytest.raises(MachineError, match="ran out of memory") as error:
        sample(model, seeds=seeds, prompts=prompts, num_steps=2, guidance_scale=None)
    assert error.value.hint == hint


SCHEDULERS = {
    "DDIMScheduler": {},
    "DDPMScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "DPMSolverMultistepScheduler": {"use_karras_sigmas": True},
    "DPMSolverMultistepScheduler, with noise": {"algorithm_type": "sde-dpmsolver++"},
    "DPMSolverSinglestepScheduler": {},
    "UniPCMultistepScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "LCMScheduler": {},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_whatever_scheduler_a_pipeline_carries_is_sampled_with(tiny_sd: Path, name: str) -> None:
    """Noise that a scheduler adds during sampling depends on the image, not on the batch."""
    model = load_model(str(tiny_sd), CPU, torch.float32)
    cls = getattr(diffusers, name.partition(",")[0])
    model.pipeline.scheduler = cls.from_config(model.pipeline.scheduler.config, **SCHEDULERS[name])
    together = sample(model, seeds=[1, 2], prompts=["one", "two"], num_steps=4, guidance_scale=2.0)
    alone = sample(model, seeds=[2], prompts=["two"], num_steps=4, guidance_scale=2.0)
    assert type(model.pipeline.scheduler) is cls
    torch.testing.assert_close(together.latents[1:2], alone.latents, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together.latents[0], together.latents[1], atol=1e-2)


def test_samples_have_the_documented_form(stable_diffusion: LoadedModel, pixels: LoadedModel) -> None:
    latent = sample(stable_diffusion, seeds=[5, 6], prompts=["a", "b"], num_steps=2, guidance_scale=None)
    assert latent.images.shape == (2, 1, 16, 16)
    assert latent.images.dtype == torch.uint8
    assert latent.latents.shape == (2, 4, 8, 8)
    assert latent.latents.dtype == torch.float32
    pixel = sample(pixels, seeds=[5, 6], prompts=None, num_steps=2, guidance_scale=None)
    expected = ((pixel.latents / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    assert torch.equal(pixel.images, expected)


def test_a_class_conditional_transformer_samples(tiny_dit: Path) -> None:
    model = load_model(str(tiny_dit), CPU, torch.float32)
    assert model.denoiser_name == "transformer"
    samples = sample(model, seeds=[1, 2], prompts=None, num_steps=2, guidance_scale=4.0)
    assert samples.latents.shape == (2, 4, 4, 4)


def test_eta_draws_noise_image_by_image(pixels: LoadedModel) -> None:
    noisy = LoadedModel(
        pixels.ref, pixels.entry.model_copy(update={"eta": 1.0}), pixels.pipeline, "unet", pixels.folder
    )
    together = sample(noisy, seeds=[1, 2], prompts=None, num_steps=3, guidance_scale=None)
    alone = sample(noisy, seeds=[2], prompts=None, num_steps=3, guidance_scale=None)
    still = sample(pixels, seeds=[2], prompts=None, num_steps=3, guidance_scale=None)
    torch.testing.assert_close(together.latents[1:], alone.latents, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(alone.latents, still.latents, atol=1e-2)


def test_prompts_that_are_missing_or_too_few_are_reported(stable_diffusion: LoadedModel) -> None:
    with pytest.raises(InputError, match="makes images from prompts"):
        sample(stable_diffusion, seeds=[1], prompts=None, num_steps=2, guidance_scale=2.0)
    with pytest.raises(UsageError, match="2 images need as many prompts, not 1"):
        sample(stable_diffusion, seeds=[1, 2], prompts=["one"], num_steps=2, guidance_scale=2.0)


def test_more_steps_than_timesteps_are_refused(pixels: LoadedModel) -> None:
    with pytest.raises(UsageError, match=r"1001 sampler steps were requested, but .* has 1000 timesteps"):
        sample(pixels, seeds=[1], prompts=None, num_steps=1001, guidance_scale=None)


def test_values_that_are_not_finite_are_reported_and_the_scheduler_is_left_clean(pixels: LoadedModel) -> None:
    weight = pixels.denoiser.get_parameter("conv_out.bias")
    before = weight.clone()
    try:
        weight.fill_(float("nan"))
        with pytest.raises(InputError, match="not finite"):
            sample(pixels, seeds=[1], prompts=None, num_steps=2, guidance_scale=None)
    finally:
        weight.copy_(before)
    assert "step" not in vars(pixels.pipeline.scheduler)


def loaded(pipeline: Any) -> LoadedModel:
    """A pipeline built in memory, as `load_model` would give it."""
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.eval()
    entry = ModelEntry(name="tiny", source="folder", location="tiny", denoiser="", sampler="", num_steps=2)
    return LoadedModel(ModelRef(id="tiny", fingerprint=""), entry, pipeline, "unet", None)


def test_a_picture_is_what_the_pipeline_itself_shows() -> None:
    """DeepFloyd IF brings only arrays and pictures to [0, 1], no tensors."""
    torch.manual_seed(0)
    pipeline = deepfloyd()
    model = loaded(pipeline)
    images = sample(model, seeds=[3], prompts=["a"], num_steps=2, guidance_scale=2.0).images
    generator = [torch.Generator().manual_seed(3)]
    shown = pipeline(prompt=["a"], num_inference_steps=2, guidance_scale=2.0, generator=generator).images[0]
    assert np.array_equal(np.asarray(shown), images[0].movedim(0, -1).numpy())


def test_an_unconditional_consistency_model_needs_no_labels() -> None:
    pipeline = consistency()
    model = loaded(pipeline)
    assert sample(model, seeds=[1, 2], prompts=None, num_steps=2, guidance_scale=None).images.shape == (2, 3, 16, 16)


def test_a_pipeline_that_needs_images_takes_them_from_a_folder(tmp_path: Path) -> None:
    pipeline = inpainting()
    model = loaded(pipeline)
    arguments: dict[str, Any] = {"seeds": [1, 2], "prompts": ["a", "b"], "num_steps": 2, "guidance_scale": 2.0}
    with pytest.raises(InputError, match="does not sample with these arguments") as caught:
        sample(model, **arguments)
    assert "--images DIR" in str(caught.value.hint)
    Image.new("RGB", (16, 16), "red").save(tmp_path / "one.png")
    model.entry = model.entry.model_copy(update={"images": str(tmp_path)})
    with pytest.raises(InputError, match=r"one\.mask\.png is missing"):
        sample(model, **arguments)
    Image.new("L", (30, 17), 255).save(tmp_path / "one.mask.png")
    with pytest.raises(InputError, match=r"one\.mask\.png has 30x17 pixels, and one\.png has 16x16"):
        sample(model, **arguments)
    Image.new("L", (8, 8), 255).save(tmp_path / "one.mask.png")
    assert sample(model, **arguments).images.shape == (2, 3, 16, 16)


@pytest.mark.parametrize(("size", "reason"), [(9, "is 9"), (None, "is missing")])
def test_a_size_that_is_missing_or_odd_is_named(
    stable_diffusion: LoadedModel, size: int | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = stable_diffusion.denoiser
    monkeypatch.setattr(denoiser, "_internal_dict", FrozenDict({**denoiser.config, "sample_size": size}))
    with pytest.raises(InputError, match="does not sample with these arguments") as caught:
        sample(stable_diffusion, seeds=[0], prompts=["a"], num_steps=1, guidance_scale=None)
    assert f"sample_size in unet/config.json, which {reason}" in str(caught.value.hint)


def test_a_copy_of_the_scheduler_steps_by_itself() -> None:
    """LTX-2 copies its scheduler for the sound; only the steps of the scheduler itself are the clip's."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler, last = FlowMatchEulerDiscreteScheduler(), []
    with watched_scheduler(SimpleNamespace(scheduler=scheduler), {}, last):
        assert type(scheduler) is FlowMatchEulerDiscreteScheduler  # pipelines compare it
        scheduler.set_timesteps(4)
        copied = deepcopy(scheduler)
        copied.step(torch.ones(1, 2), copied.timesteps[0], torch.zeros(1, 2))
        assert (last, scheduler.step_index) == ([], None)
        scheduler.step(torch.ones(1, 2), scheduler.timesteps[0], torch.zeros(1, 2))
    assert len(last) == 1
    assert "step" not in vars(scheduler)


@pytest.mark.parametrize("build", [inpainting, stable_video])
def test_a_pipeline_that_needs_images_names_the_flag_and_the_command(build: Any, tmp_path: Path) -> None:
    """Whether its call insists on the image itself, or the pipeline refuses it when it is missing."""
    build().save_pretrained(tmp_path)
    model = load_model(str(tmp_path), CPU, torch.float32)
    prompts = ["a cat"] if build is inpainting else None
    with pytest.raises(InputError, match="--images names no") as error:
        sample(model, seeds=[1], prompts=prompts, num_steps=1, guidance_scale=None)
    assert error.value.hint.startswith(f"edadm collect --model {model.ref.id} --images DIR")
    assert ("NAME.mask.png" in error.value.hint) == (build is inpainting)


def test_noise_of_the_global_generator_follows_the_seed(stable_diffusion: LoadedModel) -> None:
    """JoyImage-Edit generates the latents of its images without the generators that it is given."""
    encode = type(stable_diffusion.pipeline).encode_prompt
    numbers = []

    def noisy(*args: Any, **kwargs: Any) -> Any:
        numbers.append(torch.randn(1).item())
        return encode(stable_diffusion.pipeline, *args, **kwargs)

    stable_diffusion.pipeline.encode_prompt = noisy
    try:
        torch.manual_seed(17)
        for seed in (3, 3, 4):
            sample(stable_diffusion, seeds=[seed], prompts=["a"], num_steps=1, guidance_scale=1.0)
        after = torch.randn(1)
    finally:
        del stable_diffusion.pipeline.encode_prompt
    assert numbers[0] == numbers[1] != numbers[2]
    assert torch.equal(after, torch.randn(1, generator=torch.Generator().manual_seed(17))), "the global state is kept"
