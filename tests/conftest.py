"""Tiny pipelines with random weights and the blocks of the real ones, built once per session, offline."""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.integration.fresh_interpreter import SILENCING, FreshInterpreter

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("COLUMNS", None)  # tables have the width that they have in a log, wherever the tests run
# Python looks for cycles of objects each 700 new ones, and the libraries make millions: a sixth of the tests' time.
gc.set_threshold(20_000, 10, 10)
# The same examples in every run, however slow the machine is: what passes once passes again.
settings.register_profile(
    "repeatable", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Iterator[None]:
    """Gives a fixture that tests share the same random numbers, whichever test requests it first."""
    with ExitStack() as stack:
        if fixturedef.scope != "function":
            stack.enter_context(_random_numbers_of_its_own())
        return (yield)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Gives every test the same random numbers, whichever tests ran before it in the same process."""
    with _random_numbers_of_its_own():
        yield


@pytest.fixture(autouse=True)
def _audible_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes what a command in this process did to silence the processes that it starts."""
    for name in SILENCING:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion whose denoiser has 52,000 parameters: text encoder, autoencoder, UNet, PNDM.

    All tests of a session share the folder, so a test copies it before it changes it.
    """
    from diffusers import PNDMScheduler

    from tests.denoisers import parts

    _seed(0)
    unet, vae = parts.unet(block_out_channels=(8, 16)), parts.small_kl(in_channels=1, out_channels=1)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = PNDMScheduler(**betas, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    pipeline = parts.assembled(
        "StableDiffusionPipeline", unet, parts.clip(), vae=vae, scheduler=scheduler, **parts.NO_CHECKER
    )
    return _saved(pipeline, tmp_path_factory, "tiny-sd")


@pytest.fixture(scope="session")
def few_blocks_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion like `tiny_sd` with a quarter of its blocks, for tests that compile; shared like `tiny_sd`."""
    from diffusers import DDIMScheduler

    from tests.denoisers import parts
    from tests.denoisers.families import FAMILIES

    _seed(0)
    unet, vae = FAMILIES["unet"](up_block_types=("UpBlock2D",)), parts.small_kl()
    scheduler = DDIMScheduler()
    name = "StableDiffusionPipeline"
    pipeline = parts.assembled(name, unet, parts.clip(), vae=vae, scheduler=scheduler, **parts.NO_CHECKER)
    return _saved(pipeline, tmp_path_factory, "few-blocks-sd")


@pytest.fixture(scope="session")
def tiny_ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UNet of 45,000 parameters in pixel space with DDIM; shared like `tiny_sd`."""
    from diffusers import DDIMPipeline, DDIMScheduler

    from tests.denoisers import parts

    _seed(1)
    unet = parts.pixel_unet(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16))
    return _saved(DDIMPipeline(unet=unet, scheduler=DDIMScheduler(clip_sample=True)), tmp_path_factory, "tiny-ddpm")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion XL with two text encoders, nested conditions and Euler; shared like `tiny_sd`."""
    from diffusers import EulerDiscreteScheduler

    from tests.denoisers import parts

    _seed(3)
    unet, vae = parts.xl_unet(block_out_channels=(8, 16)), parts.small_kl()
    tokenizer, first = parts.clip()
    second = parts.clip(projection=True)[1]
    texts = (tokenizer, first), (tokenizer, second)
    pipeline = parts.assembled("StableDiffusionXLPipeline", unet, *texts, vae=vae, scheduler=EulerDiscreteScheduler())
    return _saved(pipeline, tmp_path_factory, "tiny-sdxl")


@pytest.fixture(scope="session")
def tiny_dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional transformer of two blocks with guidance; shared like `tiny_sd`."""
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    from tests.denoisers import parts

    _seed(2)
    transformer = DiTTransformer2DModel(
        sample_size=4,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_embeds_ada_norm=1000,
        norm_num_groups=4,
    )
    vae = parts.kl(levels=1, sample_size=8, scaling_factor=parts.SCALING_FACTOR)
    pipeline = parts.assembled("DiTPipeline", transformer, vae=vae, scheduler=DDIMScheduler())
    return _saved(pipeline, tmp_path_factory, "tiny-dit")


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the Inception network in a file that torch-fidelity reads; shared like `tiny_sd`."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {})
        torch.save(FeatureExtractorInceptionV3("random", ["2048"]).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def fresh_interpreter() -> Iterator[FreshInterpreter]:
    """Runs scripts in separate processes that have imported diffusers and nothing of this project."""
    interpreter = FreshInterpreter()
    yield interpreter
    interpreter.close()


@pytest.fixture
def processor_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets clocks measure the processor time of this process, which other work on the machine does not lengthen."""
    import time

    for name in ("perf_counter", "monotonic"):
        monkeypatch.setattr(time, name, time.process_time)


@pytest.fixture
def forked_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Isolated processes fork from one that has imported torch and diffusers, which costs each of them no time.

    They still share nothing with this process, and a crash still ends them alone.
    """
    import multiprocessing

    from edadm_cli.engines import isolation

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "diffusers.models.unets.unet_2d_condition"])
    monkeypatch.setattr(isolation, "multiprocessing", SimpleNamespace(get_context=lambda _: context))


@contextmanager
def _random_numbers_of_its_own() -> Iterator[None]:
    """Seeds Python's generator and those of the libraries that are loaded, and sets them back afterwards."""
    with ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        random.seed(0)
        if numpy := sys.modules.get("numpy"):
            stack.callback(numpy.random.set_state, numpy.random.get_state())
            numpy.random.seed(0)
        if torch := sys.modules.get("torch"):
            stack.enter_context(torch.random.fork_rng(devices=[]))
            torch.manual_seed(0)
        yield


def _seed(seed: int) -> None:
    import torch

    torch.manual_seed(seed)


def _saved(pipeline: Any, tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    folder = tmp_path_factory.mktemp("models") / name
    pipeline.save_pretrained(folder)
    return folder
