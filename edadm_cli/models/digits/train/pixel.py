"""Trains `digits-ddpm`, an unconditional denoiser of 16x16 pixels."""

from __future__ import annotations

import dataclasses

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor
from torch.nn import functional

from edadm_cli.models.digits.data import to_image_format
from edadm_cli.models.digits.train.corpus import Corpus
from edadm_cli.models.digits.train.loop import Schedule, discard_checkpoint, fit
from edadm_cli.models.digits.train.measure import measure_pixels
from edadm_cli.models.digits.train.record import is_trained, write_record
from edadm_cli.models.digits.train.settings import TrainSettings

NAME = "digits-ddpm"
SCHEDULE = Schedule(epochs=120, batch_size=512, learning_rate=1e-3, warmup_steps=500, average_decay=0.9995)


def build_denoiser() -> UNet2DModel:
    """Builds the untrained denoiser, which has DDPM's blocks on two resolutions and attention on the lower one."""
    return UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 48),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=8,
    )


def build_scheduler() -> DDIMScheduler:
    """Builds the scheduler of DDPM's CIFAR-10 model: it has linear betas and clips clean images to [-1, 1]."""
    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=True
    )


class PixelTask:
    r"""Minimises $|\epsilon - \epsilon_\theta(\sqrt{\bar\alpha_t} x + \sqrt{1 - \bar\alpha_t}\, \epsilon, t)|^2$."""

    def __init__(self, corpus: Corpus, settings: TrainSettings) -> None:
        self.module = build_denoiser().to(settings.device)
        self._images = to_image_format(corpus.train_images, 16).to(settings.device)
        self._signal = build_scheduler().alphas_cumprod.to(settings.device)

    def draw(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Returns noisy images `(B, 1, 16, 16)`, their timesteps `(B,)` and the noise, shaped like the images."""
        images = self._images[index].float() / 127.5 - 1
        noise = torch.randn(images.shape, generator=generator, device=generator.device)
        timestep = torch.randint(len(self._signal), (len(index),), generator=generator, device=generator.device)
        signal = self._signal[timestep].view(-1, 1, 1, 1)
        return signal.sqrt() * images + (1 - signal).sqrt() * noise, timestep, noise

    def loss(self, *inputs: Tensor) -> Tensor:
        """Returns the mean squared error of the predicted noise."""
        noisy, timestep, noise = inputs
        return functional.mse_loss(self.module(noisy, timestep).sample, noise)


def train_pixels(corpus: Corpus, settings: TrainSettings) -> None:
    """Trains the denoiser and writes the pipeline."""
    folder = settings.weights / NAME
    if is_trained(folder, settings, corpus):
        return
    torch.manual_seed(settings.seed)
    task = PixelTask(corpus, settings)
    schedule = dataclasses.replace(SCHEDULE, epochs=SCHEDULE.epochs * settings.epochs_scale)
    fitted = fit(task, schedule, len(corpus.train_images), settings, NAME)
    DDIMPipeline(unet=task.module, scheduler=build_scheduler()).to(torch.float16).save_pretrained(folder)
    measurements = measure_pixels(settings, settings.weights)
    write_record(folder, settings, corpus, schedule, fitted, {"denoiser": task.module}, measurements)
    discard_checkpoint(settings, NAME)
