"""Single-file Stable Diffusion checkpoints load offline and compute what they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from edadm_cli.errors import InputError
from edadm_cli.models.architecture import Architecture, load_architecture
from edadm_cli.models.checkpoints import opening
from edadm_cli.models.checkpoints.accounting import autoencoder_places, denoiser_places, empty_module
from edadm_cli.models.loading import load_model
from edadm_cli.models.random_models import build_random_pipeline
from edadm_cli.models.registry import known_models
from edadm_cli.models.sampling import sample
from tests.unit.models.compvis import State, autoencoder_state, open_clip_state, unet_state, with_schedule
from tests.unit.models.tiny import shrunk

CPU = torch.device("cpu")


@pytest.fixture
def small_sd15(monkeypatch: pytest.MonkeyPatch) -> Architecture:
    """The architecture of sd15 with a fraction of its channels; the text encoder keeps the vocabulary."""
    components = dict(load_architecture("sd15").components)
    changes: dict[str, dict[str, Any]] = {
        "unet": {"block_out_channels": [32, 64], "sample_size": 8, "cross_attention_dim": 32, "layers_per_block": 1}
        | {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}
        | {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]},
        "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        "vae": {"block_out_channels": [32, 64], "layers_per_block": 1, "sample_size": 16}
        | {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2},
    }
    for name, change in changes.items():
        components[name] = (components[name][0], {**components[name][1], **change})
    small = load_architecture("sd15").model_copy(update={"components": components})
    monkeypatch.setattr(opening, "load_architecture", lambda name: {"sd15": small}[name])
    return small


def state_of(pipeline: Any) -> State:
    state = with_schedule(unet_state(pipeline.unet) | autoencoder_state(pipeline.vae))
    for name, tensor in pipeline.text_encoder.state_dict().items():
        old = name if name.startswith("text_model.") else f"text_model.{name}"
        state[f"cond_stage_model.transformer.{old}"] = tensor.clone()
    positions = torch.arange(77)[None]
    return {**state, "cond_stage_model.transformer.text_model.embeddings.position_ids": positions}


def write(path: Path, state: State) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save({"state_dict": state}, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_single_file_gives_the_images_of_its_weights(tmp_path: Path, small_sd15: Architecture, suffix: str) -> None:
    pipeline = build_random_pipeline(small_sd15, 0, torch.float32)
    path = write(tmp_path / f"model{suffix}", state_of(pipeline))
    model = load_model(str(path), CPU, torch.float32)
    for name in ("unet", "vae", "text_encoder"):
        loaded, original = model.pipeline.components[name].state_dict(), pipeline.components[name].state_dict()
        assert loaded.keys() == original.keys()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in original.items())
    assert type(model.pipeline.scheduler).__name__ == "PNDMScheduler"
    assert model.pipeline.tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert model.entry.source == "file"
    assert model.entry.guidance_scale == 7.5
    images = sample(model, seeds=[3], prompts=["a cat"], num_steps=2, guidance_scale=2.0).images
    assert images.shape == (1, 3, 16, 16)


def small_of(name: str) -> Architecture:
    components = dict(shrunk(name).components)
    if name == "sdxl":  # two text encoders are told apart by their widths
        for part, change in {
            "text_encoder_2": {"hidden_size": 64},
            "unet": {"cross_attention_dim": 96},
        }.items():
            components[part] = (components[part][0], {**components[part][1], **change})
    return shrunk(name).model_copy(update={"components": components})


@pytest.mark.parametrize("name", ["sd21", "sdxl"])
def test_newer_versions_load_with_their_text_encoders(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = small_of(name)
    monkeypatch.setattr(opening, "load_architecture", lambda known: {name: small}[known])
    pipeline = build_random_pipeline(small, 0, torch.float32)
    state = with_schedule(unet_state(pipeline.unet) | autoencoder_state(pipeline.vae))
    if name == "sd21":
        state |= open_clip_state(pipeline.text_encoder, "cond_stage_model.model.")
    else:
        state |= open_clip_state(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
        for key, tensor in pipeline.text_encoder.state_dict().items():
            state[f"conditioner.embedders.0.transformer.text_model.{key.removeprefix('text_model.')}"] = tensor.clone()
    model = load_model(str(write(tmp_path / "model.safetensors", state)), CPU, torch.float32)
    assert model.entry.num_steps == known_models()[name].num_steps
    for part, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            loaded, original = model.pipeline.components[part].state_dict(), component.state_dict()
            assert loaded.keys() == original.keys()
            assert all(torch.equal(loaded[key], tensor) for key, tensor in original.items()), part
    images = sample(model, seeds=[3], prompts=["a cat"], num_steps=2, guidance_scale=5.0).images
    assert images.shape == (1, 3, 16, 16)


# Tensors of the published checkpoints, of the denoiser and of the autoencoder.
NUM_TENSORS = {"sd15": (686, 248), "sd21": (686, 248), "sdxl": (1680, 248)}


@pytest.mark.parametrize("name", sorted(NUM_TENSORS))
def test_full_size_names_are_as_many_as_in_the_published_checkpoints(name: str) -> None:
    architecture = load_architecture(name)
    found = []
    for part, places in (("unet", denoiser_places), ("vae", autoencoder_places)):
        module = empty_module(architecture, part)
        place = places(module)
        found.append(len({place(key).key for key, _ in module.named_parameters()}))
    assert tuple(found) == NUM_TENSORS[name]


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.middle_block.0.in_layers.2.weight",
        "first_stage_model.decoder.conv_in.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    ],
)
def test_a_missing_tensor_is_named(tmp_path: Path, small_sd15: Architecture, key: str) -> None:
    state = state_of(build_random_pipeline(small_sd15, 0, torch.float32))
    del state[key]
    with pytest.raises(InputError) as caught:
        load_model(str(write(tmp_path / "model.safetensors", state)), CPU, torch.float32)
    assert key.rsplit(".", 2)[1] in caught.value.message


def test_a_tensor_too_many_is_named(tmp_path: Path, small_sd15: Architecture) -> None:
    state = state_of(build_random_pipeline(small_sd15, 0, torch.float32))
    state["model.diffusion_model.input_blocks.9.0.extra.weight"] = torch.zeros(1)
    with pytest.raises(InputError, match=r"does not take: .*extra"):
        load_model(str(write(tmp_path / "model.safetensors", state)), CPU, torch.float32)


def test_every_bit_of_the_content_counts_in_the_fingerprint(tmp_path: Path, small_sd15: Architecture) -> None:
    state = state_of(build_random_pipeline(small_sd15, 0, torch.float32))
    first = load_model(str(write(tmp_path / "a.safetensors", state)), CPU, torch.float32).ref
    again = load_model(str(write(tmp_path / "b.safetensors", state)), CPU, torch.float32).ref
    state["model.diffusion_model.out.2.bias"][0] += 1
    other = load_model(str(write(tmp_path / "c.safetensors", state)), CPU, torch.float32).ref
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.id == str(tmp_path / "a.safetensors")
