"""Where weights are while a pipeline samples: the same samples from each placement, and the first one that fits."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from edadm_cli.errors import InputError
from edadm_cli.models.loading import load_model
from edadm_cli.models.pipeline_calls.encoding import encode_first
from edadm_cli.models.pipeline_calls.sampling import sample
from edadm_cli.models.placement import Placement, memory_of, placement
from edadm_cli.models.sources.locating import locate
from edadm_cli.models.sources.stored_denoiser import weight_bytes
from edadm_cli.models.stored import is_stored

CPU = torch.device("cpu")
PROMPTS = ["one", "two"]


def _samples(folder: Path, where: Placement, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, Tensor]:
    model = load_model(str(folder), CPU, dtype, placement=where)
    batches = [partial(sample, model, seeds=[i], prompts=[PROMPTS[i]], num_steps=2, guidance_scale=3.0) for i in (0, 1)]
    encode_first(model, batches)
    latents = torch.cat([batch().latents for batch in batches])
    if where != "memory":
        with pytest.raises(InputError, match="had not encoded before"):
            sample(model, seeds=[0], prompts=["three"], num_steps=1, guidance_scale=3.0)
    return model.denoiser, model.pipeline.text_encoder, latents


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_placement_gives_the_same_samples_and_frees_the_encoders(tiny_sd: Path, dtype: torch.dtype) -> None:
    _, _, expected = _samples(tiny_sd, "memory", dtype)
    for where in ("turns", "disk"):
        denoiser, encoder, latents = _samples(tiny_sd, where, dtype)
        assert torch.equal(latents, expected)
        assert sum(parameter.numel() for parameter in encoder.parameters()) == 0
        assert any(is_stored(module) for module in denoiser.modules()) == (where == "disk")


@pytest.mark.parametrize(("name", "index"), [("cuda", 1), ("cuda:0", 0)])
def test_the_memory_of_a_gpu_is_the_share_that_the_process_may_use(
    name: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch takes the number of a GPU here, and no device without one."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=1000 + index))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda index: {0: 1.0, 1: 0.5}[index])
    assert memory_of(torch.device(name)) == {0: 1000, 1: 500}[index]


def test_the_first_placement_that_fits_is_taken(tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = weight_bytes(locate(str(tiny_sd)), torch.float32)
    loaded = load_model(str(tiny_sd), CPU, torch.float32)
    assert sizes["unet"] == 4 * sum(parameter.numel() for parameter in loaded.denoiser.parameters())
    memory, chosen = {"all": sum(sizes.values()), "unet": sizes["unet"] + sizes["vae"], "little": 0}, {}
    for name, needed in memory.items():
        monkeypatch.setattr("edadm_cli.models.placement.memory_of", lambda _, needed=needed: needed / 0.7 + 1)
        chosen[name] = placement(sizes, "auto", CPU)
    assert chosen == {"all": "memory", "unet": "turns", "little": "disk"}


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_the_share_of_a_gpu_is_asked_for_by_its_number(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses 'cuda' without a number in some of its functions, as this stand-in of one does."""

    def fraction(index: object) -> float:
        return {0: 0.5, 1: 0.25}[torch.cuda._utils._get_device_index(index)]

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=1000))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", fraction)
    assert memory_of(torch.device(device)) == (500 if device == "cuda" else 250)
