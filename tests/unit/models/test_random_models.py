"""Random models: the real architectures, weights that depend on the seed alone, activations of a scale of one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edadm_cli.models.architecture import FOLDER, WEIGHTS_VERSION, Architecture, load_architecture
from edadm_cli.models.checkpoints.accounting import empty_module
from edadm_cli.models.example_calls import example_call
from edadm_cli.models.quiet import quiet_libraries
from edadm_cli.models.random_models import (
    _construct,
    build_denoiser,
    build_random_pipeline,
    initialize,
)
from edadm_cli.models.registry import known_models
from tests.unit.models.tiny import SHRUNK, shrunk

SHIPPED = sorted(path.stem for path in FOLDER.glob("*.json"))
"""The names of the architectures that ship with the package."""

# Millions of parameters of the denoisers, as their papers and model cards round them.
PUBLISHED = {
    "ddpm-cifar10": 35.7,
    "ldm-bedroom": 274,
    "ldm-church": 295,
    "ldm-imagenet": 400,
    "sd15": 860,
    "sd21": 865,
    "sdxl": 2600,
    "pixart-sigma": 610,
    "flux-schnell": 12000,
    "sd3.5-large": 8057,
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_architectures_have_the_published_number_of_parameters(name: str) -> None:
    architecture = load_architecture(name)
    denoiser = empty_module(architecture, architecture.denoiser_name)
    millions = sum(parameter.numel() for parameter in denoiser.parameters()) / 1e6
    assert millions == pytest.approx(PUBLISHED[name], rel=0.015)


# Millions of parameters of further denoisers, which their authors call 4, 20, 6, 1.6, 2.6, 1.3, 2, 1.5 and 1.2 billion.
FURTHER = {
    "flux2-klein": 3876,
    "qwen-image": 20430,
    "z-image-turbo": 6155,
    "sana-1.6b": 1604,
    "lumina2": 2610,
    "wan2.1-1.3b": 1419,
    "cogvideox-2b": 1694,
    "svd": 1525,
    "kandinsky-2.2": 1253,
}


@pytest.mark.parametrize("name", sorted(FURTHER))
def test_a_whole_pipeline_of_the_real_size_fits_together_without_memory(name: str) -> None:
    architecture = load_architecture(name)
    modules = {}
    for part in architecture.components:
        cls = architecture.component_class(part)
        if issubclass(cls, nn.Module):
            with quiet_libraries(), torch.device("meta"):
                modules[part] = _construct(cls, architecture.config(part))
    pipeline = build_random_pipeline(architecture, 0, torch.bfloat16, ready=modules)
    assert pipeline.components.keys() >= architecture.components.keys()
    millions = sum(parameter.numel() for parameter in modules[architecture.denoiser_name].parameters()) / 1e6
    assert millions == pytest.approx(FURTHER[name], rel=1e-3)
    encoders = [module for part, module in modules.items() if "encoder" in part]
    assert sum(parameter.numel() for encoder in encoders for parameter in encoder.parameters()) < 1.5e9


@pytest.mark.parametrize("name", SHRUNK)
def test_every_architecture_runs_at_its_real_depth_of_kinds(name: str) -> None:
    """Small in width and depth, but of the same classes, options and conditions."""
    architecture = shrunk(name)
    pipeline = build_random_pipeline(architecture, 0, torch.float32)
    denoiser = getattr(pipeline, architecture.denoiser_name)
    args, kwargs = example_call(denoiser, batch_size=2, seed=1)
    with torch.no_grad(), layer_outputs(denoiser) as outputs:
        result = denoiser(*args, **kwargs).sample
    assert result.shape[0] == 2
    assert bool(result.isfinite().all())
    assert 0.1 < float(result.std()) < 10
    assert outputs
    assert all(0.01 < deviation < 50 for deviation in outputs.values()), outputs


@pytest.mark.parametrize("name", SHRUNK)
def test_example_calls_are_calls_that_the_denoiser_takes(name: str) -> None:
    architecture = shrunk(name)
    denoiser = empty_module(architecture, architecture.denoiser_name)
    denoiser.to_empty(device="cpu")
    args, kwargs = example_call(denoiser, batch_size=3)
    bound = inspect.signature(denoiser.forward).bind(*args, **kwargs).arguments
    rows = [value.shape[0] for key, value in bound.items() if isinstance(value, Tensor) and value.ndim > 1]
    assert rows.count(3) >= 1
    again, other = (example_call(denoiser, batch_size=3, seed=seed)[0] for seed in (0, 1))
    first = next((value for value in args if isinstance(value, Tensor)), None)
    if first is not None:
        assert torch.equal(first, again[0])
        assert not torch.equal(first, other[0])


def test_a_size_is_that_of_the_latents() -> None:
    architecture = shrunk("sd15")
    denoiser = empty_module(architecture, "unet")
    denoiser.to_empty(device="cpu")
    args, _ = example_call(denoiser, batch_size=1, size=(24, 16))
    assert args[0].shape == (1, 4, 24, 16)


def test_weights_depend_on_the_seed_and_on_nothing_else() -> None:
    def weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        return build_random_pipeline(shrunk("sd15"), seed, dtype).unet.state_dict()

    first = weights(0)
    threads = torch.get_num_threads()
    torch.manual_seed(17)
    torch.set_num_threads(2)
    try:
        again = weights(0)
    finally:
        torch.set_num_threads(threads)
    other, half = weights(1), weights(0, torch.bfloat16)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert all(torch.equal(tensor.to(torch.bfloat16), half[name]) for name, tensor in first.items())
    assert not torch.equal(first["conv_in.weight"], other["conv_in.weight"])


def test_a_denoiser_alone_has_the_weights_that_it_has_in_its_pipeline() -> None:
    alone = build_denoiser("ddpm-cifar10-random", seed=3)
    whole = build_random_pipeline(load_architecture("ddpm-cifar10"), 3, torch.float32).unet
    assert not alone.training
    assert not any(parameter.requires_grad for parameter in alone.parameters())
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), whole.parameters(), strict=True))


def test_no_parameter_is_left_as_it_was_built() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.Linear(8, 8), nn.Embedding(5, 8))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(float("nan"))
    initialize(module, 0)
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())
    assert abs(float(module[1].weight.mean()) - 1) < 0.2


def test_fingerprints_tell_architectures_and_seeds_apart() -> None:
    prints = {load_architecture(n).fingerprint(s, WEIGHTS_VERSION) for n in SHIPPED for s in (0, 1)}
    assert len(prints) == 2 * len(SHIPPED)


def test_every_architecture_has_a_random_model_and_its_model_agrees_with_it() -> None:
    models = known_models()
    for name in SHIPPED:
        entry, architecture = models[f"{name}-random"], load_architecture(name)
        assert entry.source == "random"
        assert entry.denoiser == architecture.component_class(architecture.denoiser_name).__name__
        assert entry.paper == models[name].paper


@contextmanager
def layer_outputs(module: nn.Module) -> Iterator[dict[str, float]]:
    """Standard deviations of what each convolution and linear layer puts out."""
    actual: dict[str, float] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, inputs: Any, output: Tensor) -> None:
            actual[name] = float(output.float().std())

        return hook

    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    handles = [layer.register_forward_hook(note(name)) for name, layer in layers]
    try:
        yield actual
    finally:
        for handle in handles:
            handle.remove()


def test_shrunk_architectures_are_small_and_keep_their_classes() -> None:
    for name in SHRUNK:
        small, real = shrunk(name), load_architecture(name)
        assert isinstance(small, Architecture)
        assert {k: v[0] for k, v in small.components.items()} == {k: v[0] for k, v in real.components.items()}
