"""Trains the text encoder and the denoiser of `digits-sd` together, on the latents of the trained autoencoder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from edadm_cli.models.digits.data import captions_of, to_image_format
from edadm_cli.models.digits.train.autoencoder import encode, load_autoencoder
from edadm_cli.models.digits.train.corpus import Corpus
from edadm_cli.models.digits.train.loop import Schedule, discard_checkpoint, fit
from edadm_cli.models.digits.train.measure import measure_text_to_image
from edadm_cli.models.digits.train.record import is_trained, write_json, write_record
from edadm_cli.models.digits.train.settings import TrainSettings
from edadm_cli.models.digits.train.tokenizer import MAX_LENGTH, build_tokenizer

NAME = "digits-sd"
SCHEDULE = Schedule(epochs=80, batch_size=512, learning_rate=1e-3, warmup_steps=500, average_decay=0.9995)
_EMPTY_PROMPT_SHARE = 0.1


def build_denoiser() -> UNet2DConditionModel:
    """Builds the untrained denoiser, which has Stable Diffusion's blocks on two resolutions."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 96),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,  # the number of heads, as in Stable Diffusion 1.x
        norm_num_groups=16,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Builds the untrained text encoder."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_scheduler() -> PNDMScheduler:
    """Builds Stable Diffusion 1.5's scheduler."""
    return PNDMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


class TextToImageTask:
    r"""Minimises $|\epsilon - \epsilon_\theta(\sqrt{\bar\alpha_t} z + \sqrt{1 - \bar\alpha_t}\, \epsilon, t, c)|^2$.

    A tenth of the images have the empty caption, because classifier-free guidance needs an unconditional prediction.
    """

    def __init__(self, corpus: Corpus, settings: TrainSettings) -> None:
        self.tokenizer = build_tokenizer()
        self.text_encoder = build_text_encoder(self.tokenizer)
        self.denoiser = build_denoiser()
        self.module = nn.ModuleList([self.text_encoder, self.denoiser]).to(settings.device)
        self.autoencoder = load_autoencoder(settings)
        images = to_image_format(corpus.train_images, 32).to(settings.device)
        scale = self.autoencoder.config.scaling_factor
        self._mean, self._deviation = (moment.clone() * scale for moment in encode(self.autoencoder, images))
        self._labels = corpus.train_labels.to(settings.device)
        self._tokens = caption_tokens(self.tokenizer).to(settings.device)
        self._signal = build_scheduler().alphas_cumprod.to(settings.device)

    def draw(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Returns noisy latents, timesteps, caption tokens and the noise."""
        device, count = generator.device, len(index)
        spread, noise = torch.randn(2, count, 4, 8, 8, generator=generator, device=device)
        latents = self._mean[index] + self._deviation[index] * spread
        timestep = torch.randint(len(self._signal), (count,), generator=generator, device=device)
        signal = self._signal[timestep].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        caption = torch.randint(self._tokens.shape[1], (count,), generator=generator, device=device)
        empty = torch.rand(count, generator=generator, device=device) < _EMPTY_PROMPT_SHARE
        row = torch.where(empty, 10, self._labels[index])
        return noisy, timestep, self._tokens[row, caption], noise

    def loss(self, *inputs: Tensor) -> Tensor:
        """Returns the mean squared error of the predicted noise."""
        noisy, timestep, tokens, noise = inputs
        states = self.text_encoder(tokens).last_hidden_state
        return functional.mse_loss(self.denoiser(noisy, timestep, states).sample, noise)


def caption_tokens(tokenizer: CLIPTokenizer) -> Tensor:
    """Returns the tokens of every caption with shape `(11, captions, length)`; row 10 is the empty prompt."""
    captions = [captions_of(digit) for digit in range(10)]
    captions.append(("",) * len(captions[0]))
    flat = [caption for row in captions for caption in row]
    tokens = tokenizer(flat, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt")
    rows: Tensor = tokens.input_ids.view(len(captions), -1, MAX_LENGTH)
    return rows


def save_pipeline(task: TextToImageTask, folder: Path) -> None:
    """Writes the complete pipeline with weights in float16.

    Whatever release of transformers is installed, the text encoder has the form of every Stable Diffusion checkpoint:
    its tensor names start with `text_model.`, and its configuration makes it load in float32 like the other components.
    The configuration of the autoencoder does not say where it was loaded from.
    """
    StableDiffusionPipeline(
        vae=task.autoencoder, text_encoder=task.text_encoder, tokenizer=task.tokenizer, unet=task.denoiser,
        scheduler=build_scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16).save_pretrained(folder)  # fmt: skip
    weights, config = folder / "text_encoder" / "model.safetensors", folder / "text_encoder" / "config.json"
    state = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(weights).items()}
    save_file(state, weights, metadata={"format": "pt"})
    write_json(config, json.loads(config.read_text()) | {"dtype": "float32"})
    config = folder / "vae" / "config.json"
    write_json(config, {key: value for key, value in json.loads(config.read_text()).items() if key != "_name_or_path"})


def train_text_to_image(corpus: Corpus, settings: TrainSettings) -> None:
    """Trains the text encoder and the denoiser, and writes the complete pipeline."""
    folder = settings.weights / NAME
    if is_trained(folder, settings, corpus):
        return
    torch.manual_seed(settings.seed)
    task = TextToImageTask(corpus, settings)
    schedule = dataclasses.replace(SCHEDULE, epochs=SCHEDULE.epochs * settings.epochs_scale)
    fitted = fit(task, schedule, len(corpus.train_images), settings, NAME)
    save_pipeline(task, folder)
    modules: dict[str, nn.Module] = {
        "denoiser": task.denoiser, "text_encoder": task.text_encoder, "autoencoder": task.autoencoder
    }  # fmt: skip
    measurements: dict[str, Any] = measure_text_to_image(settings, settings.weights)
    write_record(folder, settings, corpus, schedule, fitted, modules, measurements)
    discard_checkpoint(settings, NAME)
