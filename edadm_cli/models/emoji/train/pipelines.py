"""Writes the components that the stages trained, and builds the pipelines from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DiffusionPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from edadm_cli.models.emoji.train.networks import flow_scheduler, noise_scheduler, pixel_scheduler
from edadm_cli.models.emoji.train.prepare import TOKENIZER
from edadm_cli.models.emoji.train.settings import TrainSettings

UNET, TRANSFORMER, PIXEL = "emoji-sd", "emoji-dit", "ddpm-emoji"


def write_text_encoder(encoder: CLIPTextModelWithProjection, folder: Path) -> None:
    """Writes the text encoder with tensor names that begin with `text_model.`; every transformers release reads it."""
    encoder.save_pretrained(folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    state = {}
    for name, value in load_file(weights).items():
        bare = name.removeprefix("text_model.")
        state[bare if bare.startswith("text_projection") else f"text_model.{bare}"] = value
    save_file(state, weights, metadata={"format": "pt"})
    settings = json.loads(config.read_text()) | {"dtype": "float32"}
    config.write_text(json.dumps(settings, indent=2) + "\n")


def load_tokenizer(settings: TrainSettings) -> CLIPTokenizer:
    """Returns the tokenizer that ships beside the weights, or that of the prepared data where they have none.

    Data that was prepared with another release of `tokenizers` may number a few tokens otherwise.
    """
    shipped = settings.weights / "shared" / "tokenizer"
    return CLIPTokenizer.from_pretrained(shipped if shipped.is_dir() else settings.data / TOKENIZER)


def text_to_image_pipeline(settings: TrainSettings) -> DiffusionPipeline:
    """Returns the Stable Diffusion pipeline of the trained components."""
    shared = settings.weights / "shared"
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(shared / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(shared / "text_encoder"),
        tokenizer=load_tokenizer(settings),
        unet=UNet2DConditionModel.from_pretrained(settings.weights / UNET / "unet"),
        scheduler=noise_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def flow_pipeline(settings: TrainSettings) -> DiffusionPipeline:
    """Returns the Stable Diffusion 3 pipeline of the trained components, with one text encoder in two places."""
    shared = settings.weights / "shared"
    encoder = CLIPTextModelWithProjection.from_pretrained(shared / "text_encoder")
    tokenizer = load_tokenizer(settings)
    autoencoder = AutoencoderKL.from_pretrained(shared / "vae")
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel.from_pretrained(settings.weights / TRANSFORMER / "transformer"),
        scheduler=flow_scheduler(),
        vae=autoencoder,
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def pixel_pipeline(settings: TrainSettings) -> DiffusionPipeline:
    """Returns the unconditional pixel pipeline."""
    return DDIMPipeline(UNet2DModel.from_pretrained(settings.weights / PIXEL / "unet"), pixel_scheduler())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file beside its final path, and then moves it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)
