"""The emoji models that ship: whole, small, offline, and right about what a prompt asks for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler

from edadm_cli.errors import InputError
from edadm_cli.models.digits.data import WEIGHTS as DIGITS
from edadm_cli.models.emoji import data
from edadm_cli.models.emoji.captions import STYLES, prompt_of
from edadm_cli.models.emoji.encoder import load_picture_encoder, name_vectors
from edadm_cli.models.emoji.train.networks import noise_scheduler
from edadm_cli.models.loading import load_model
from edadm_cli.models.shipped import shipped_prompts
from edadm_cli.models.sources.folder import read_folder

CPU = torch.device("cpu")


def test_all_shipped_files_stay_under_64_megabytes() -> None:
    sizes = [path.stat().st_size for root in (DIGITS, data.WEIGHTS) for path in root.rglob("*") if path.is_file()]
    assert sum(sizes) < 64_000_000


@pytest.mark.parametrize("model", data.PIPELINES)
def test_a_picture_shows_what_its_prompt_asks_for(model: str) -> None:
    loaded = load_model(model, CPU, torch.float32)
    names = ["pear", "panda face"]
    prompts = [prompt_of(name, "fluent") for name in names]
    pictures = loaded.pipeline(
        prompts, num_inference_steps=12, guidance_scale=loaded.entry.guidance_scale, output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    assert pictures.shape == (2, 3, 64, 64)
    rows = name_vectors()
    retrieval = data.names()["retrieval"]
    expected = [retrieval.index(name) for name in names]
    scores = load_picture_encoder()(pictures.float()).embedding @ rows.T
    assert scores.argmax(1).tolist() == expected


def test_both_pipelines_share_one_copy_of_their_parts() -> None:
    folders = {name: read_folder(data.model_folder(name)) for name in data.PIPELINES}
    places = {name: {part.name: part.folder for part in folder.components} for name, folder in folders.items()}
    assert places["emoji-sd"]["vae"] == places["emoji-dit"]["vae"]
    assert places["emoji-dit"]["text_encoder"] == places["emoji-dit"]["text_encoder_2"]
    assert folders["emoji-sd"].fingerprint() != folders["emoji-dit"].fingerprint()


def test_emoji_sd_ships_the_scheduler_of_its_training_which_has_the_noise_of_ddpm() -> None:
    trained = noise_scheduler()
    shipped = EulerDiscreteScheduler.from_pretrained(data.model_folder("emoji-sd") / "scheduler")
    assert json.loads(shipped.to_json_string()) == json.loads(trained.to_json_string())
    noise = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert torch.equal(trained.alphas_cumprod, noise.alphas_cumprod)


def test_a_folder_elsewhere_shares_nothing(tmp_path: Path) -> None:
    copy = tmp_path / "emoji-sd"
    shutil.copytree(data.model_folder("emoji-sd"), copy, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(InputError, match="has no folder"):
        read_folder(copy)


def test_prompts_are_seeded_and_each_names_a_retrieval_name() -> None:
    prompts = shipped_prompts("emoji", 300, 0)
    assert prompts[:100] == shipped_prompts("emoji", 100, 0)
    assert prompts != shipped_prompts("emoji", 300, 1)
    assert len(set(prompts)) == 300
    assert all(data.label_of_prompt(prompt) is not None for prompt in prompts)


def test_the_longest_name_in_a_prompt_counts() -> None:
    name = max(data.names()["retrieval"], key=len)
    assert data.names()["retrieval"][data.label_of_prompt(f"a {name}, flat style") or 0] == name
    assert data.label_of_prompt("a treaty") is None


def test_real_pictures_and_statistics_fit_the_encoder() -> None:
    pictures = data.real_pictures()
    assert len(pictures) == data.names()["held_out_pictures"]
    features = load_picture_encoder()(pictures[:4].float() / 255)
    statistics = data.real_statistics()
    assert statistics["features_mean"].shape == features.features.shape[1:]
    assert statistics["spatial_cov"].shape == (features.spatial[0].numel(),) * 2
    assert set(data.names()["by_style"]) == set(STYLES.values())
