"""Trains the autoencoder of `digits-sd`, which encodes 3x32x32 pixels as 4x8x8 latents."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from edadm_cli.models.digits.classifier import load_classifier
from edadm_cli.models.digits.data import real_statistics, to_image_format
from edadm_cli.models.digits.train.corpus import Corpus
from edadm_cli.models.digits.train.loop import Schedule, discard_checkpoint, fit
from edadm_cli.models.digits.train.measure import classify, feature_statistics, frechet_distances, write_grid
from edadm_cli.models.digits.train.record import is_trained, write_record
from edadm_cli.models.digits.train.settings import TrainSettings

NAME = "autoencoder"
SCHEDULE = Schedule(epochs=25, batch_size=256, learning_rate=2e-3, warmup_steps=300)
_KL_WEIGHT = 5e-4
_BATCH = 1000


def build_autoencoder() -> AutoencoderKL:
    """Builds the untrained autoencoder."""
    return AutoencoderKL(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )


class AutoencoderTask:
    r"""Minimises $|x - \hat x|_1 + |x - \hat x|^2 + \beta \, \mathrm{KL}(q(z|x), \mathcal N(0, 1))$, all as means."""

    def __init__(self, corpus: Corpus, settings: TrainSettings) -> None:
        self.module = build_autoencoder().to(settings.device)
        self._images = to_image_format(corpus.train_images, 32).to(settings.device)

    def draw(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Returns images `(B, 3, 32, 32)` in [-1, 1] and the noise `(B, 4, 8, 8)` from which latents are sampled."""
        noise = torch.randn(len(index), 4, 8, 8, generator=generator, device=generator.device)
        return to_model_input(self._images[index]), noise

    def loss(self, *inputs: Tensor) -> Tensor:
        """Returns the reconstruction error plus the weighted divergence."""
        images, noise = inputs
        posterior = self.module.encode(images).latent_dist
        rebuilt = self.module.decode(posterior.mean + posterior.std * noise).sample
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        error = functional.l1_loss(rebuilt, images) + functional.mse_loss(rebuilt, images)
        return error + _KL_WEIGHT * divergence


def to_model_input(images: Tensor) -> Tensor:
    """Returns uint8 gray images `(B, 1, 32, 32)` as three equal channels in [-1, 1], `(B, 3, 32, 32)`."""
    return (images.float() / 127.5 - 1).expand(-1, 3, -1, -1)


@torch.inference_mode()
def encode(autoencoder: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean and standard deviation `(N, 4, 8, 8)` of the unscaled latents of uint8 `(N, 1, 32, 32)`."""
    posteriors = [autoencoder.encode(to_model_input(part)).latent_dist for part in images.split(_BATCH)]
    return torch.cat([part.mean for part in posteriors]), torch.cat([part.std for part in posteriors])


def train_autoencoder(corpus: Corpus, settings: TrainSettings) -> None:
    """Trains the autoencoder, scales its latents to unit variance, and writes it into the pipeline's folder."""
    folder = settings.weights / "digits-sd" / "vae"
    if is_trained(folder, settings, corpus):
        return
    torch.manual_seed(settings.seed)
    task = AutoencoderTask(corpus, settings)
    schedule = dataclasses.replace(SCHEDULE, epochs=SCHEDULE.epochs * settings.epochs_scale)
    fitted = fit(task, schedule, len(corpus.train_images), settings, NAME)
    mean, deviation = encode(task.module, to_image_format(corpus.train_images, 32).to(settings.device))
    spread = (mean.double().var() + deviation.double().square().mean()).sqrt().item()
    task.module.register_to_config(scaling_factor=round(1 / spread, 5))
    task.module.to(dtype=torch.float16).save_pretrained(folder)
    measurements = measure_autoencoder(corpus, settings)
    write_record(folder, settings, corpus, schedule, fitted, {NAME: task.module}, measurements)
    discard_checkpoint(settings, NAME)


def load_autoencoder(settings: TrainSettings) -> AutoencoderKL:
    """Loads the trained autoencoder in float32."""
    folder = settings.weights / "digits-sd" / "vae"
    autoencoder = AutoencoderKL.from_pretrained(folder)
    return autoencoder.to(settings.device, torch.float32).eval().requires_grad_(False)


@torch.inference_mode()
def measure_autoencoder(corpus: Corpus, settings: TrainSettings) -> dict[str, Any]:
    """Returns metrics of the test images after they are encoded to the mean of their latents and decoded."""
    autoencoder = load_autoencoder(settings)
    images = to_image_format(corpus.test_images, 32)
    mean, _ = encode(autoencoder, images.to(settings.device))
    decoded = torch.cat([autoencoder.decode(part).sample for part in mean.split(_BATCH)]).cpu()
    rebuilt = ((decoded.mean(dim=1, keepdim=True) / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    write_grid(torch.cat([images[:100], rebuilt[:100]]), settings.samples / "autoencoder.png")
    classifier = load_classifier(settings.device, settings.weights)
    right = classify(classifier, rebuilt).argmax(dim=1) == corpus.test_labels
    mean_square = ((rebuilt.double() - images.double()) / 255).square().mean()
    distances = frechet_distances(feature_statistics(classifier, images), feature_statistics(classifier, rebuilt))
    to_train = frechet_distances(real_statistics(32, settings.weights), feature_statistics(classifier, rebuilt))
    return {
        "psnr_db": (-10 * mean_square.log10()).item(),
        "test_accuracy_after_decoding": right.double().mean().item(),
        "distance_to_originals": distances,
        "distance_to_train": to_train,
    }
