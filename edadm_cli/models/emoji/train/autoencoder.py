"""Stage `autoencoder`: trains the autoencoder that both pipelines share, from 3x64x64 pixels to 4x16x16 latents."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from edadm_cli.models.emoji.train.corpus import Corpus
from edadm_cli.models.emoji.train.loop import Schedule
from edadm_cli.models.emoji.train.networks import LATENT_SIZE, build_autoencoder
from edadm_cli.models.emoji.train.settings import TrainSettings

NAME = "autoencoder"
SCHEDULE = Schedule(batch_size=512, learning_rate=1e-3, average_decay=0.998, constant_share=0.4)
_KL_WEIGHT = 3e-4
_EDGE_WEIGHT = 0.5
_SMALL_WEIGHT = 0.25
_BATCH = 500


class AutoencoderTask:
    r"""$|x - \hat x|_1 + |x - \hat x|^2 + w\,|\nabla x - \nabla \hat x|_1 + \beta \, \mathrm{KL}(q(z|x), \mathcal N)$.

    This is the loss; all terms are means. A quarter of the pictures are also decoded from latents of half the size and
    compared with the pictures at half the size, which keeps the latents smooth.

    References:
        EQ-VAE, arXiv 2502.09509 (scaled latents decode to scaled pictures).
    """

    def __init__(self, corpus: Corpus, settings: TrainSettings) -> None:
        torch.manual_seed(settings.seed)
        self.module = build_autoencoder(settings.small).to(settings.device)
        if settings.device.type == "cuda":
            self.module = self.module.to(memory_format=torch.channels_last)
        self._corpus = corpus

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Returns pictures `(B, 3, 64, 64)` in [-1, 1], half of them mirrored, and the noise of their latents."""
        device, train = generator.device, self._corpus.train
        index = train[torch.randint(len(train), (count,), generator=generator, device=device)]
        pictures = to_model_input(self._corpus.pixels[index])
        mirrored = torch.rand(count, generator=generator, device=device) < 0.5
        pictures = torch.where(mirrored[:, None, None, None], pictures.flip(-1), pictures)
        return pictures, torch.randn(count, 4, LATENT_SIZE, LATENT_SIZE, generator=generator, device=device)

    def loss(self, *inputs: Tensor) -> Tensor:
        """Returns the reconstruction error plus the weighted divergence."""
        pictures, noise = inputs
        posterior = self.module.encode(pictures).latent_dist
        latents = posterior.mean + posterior.std * noise
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).float().mean()
        error = _difference(self.module.decode(latents).sample, pictures)
        part = max(1, len(pictures) // 4)
        half = functional.avg_pool2d(latents[:part], 2)
        small = _difference(self.module.decode(half).sample, functional.avg_pool2d(pictures[:part], 2))
        return error + _SMALL_WEIGHT * small + _KL_WEIGHT * divergence


def _difference(rebuilt: Tensor, pictures: Tensor) -> Tensor:
    rebuilt = rebuilt.float()
    error = functional.l1_loss(rebuilt, pictures) + functional.mse_loss(rebuilt, pictures)
    for dim in (-1, -2):
        error = error + _EDGE_WEIGHT * functional.l1_loss(rebuilt.diff(dim=dim), pictures.diff(dim=dim))
    return error


def to_model_input(pixels: Tensor) -> Tensor:
    """Returns uint8 pixels as floats in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_pixels(images: Tensor) -> Tensor:
    """Returns floats in [-1, 1] as uint8 pixels."""
    return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


@torch.inference_mode()
def encode(autoencoder: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean and standard deviation `(N, 4, 16, 16)` of the unscaled latents of uint8 `(N, 3, 64, 64)`."""
    posteriors = [autoencoder.encode(to_model_input(part)).latent_dist for part in pixels.split(_BATCH)]
    return torch.cat([part.mean for part in posteriors]), torch.cat([part.std for part in posteriors])


@torch.inference_mode()
def decode(autoencoder: AutoencoderKL, latents: Tensor) -> Tensor:
    """Returns the uint8 pixels `(N, 3, 64, 64)` that scaled latents `(N, 4, 16, 16)` decode to."""
    scale, shift = autoencoder.config.scaling_factor, autoencoder.config.shift_factor or 0.0
    return torch.cat([to_pixels(autoencoder.decode(part / scale + shift).sample) for part in latents.split(_BATCH)])


def finish_autoencoder(task: AutoencoderTask, corpus: Corpus, settings: TrainSettings) -> dict[str, float]:
    """Scales the latents to unit variance, writes the weights, and returns metrics of pictures with held-out names."""
    autoencoder = task.module.eval()
    mean, deviation = encode(autoencoder, corpus.pixels[corpus.train])
    spread = (mean.double().var() + deviation.double().square().mean()).sqrt().item()
    autoencoder.register_to_config(
        scaling_factor=round(1 / spread, 5), shift_factor=0.0
    )  # the flow pipeline adds a shift
    autoencoder.to(memory_format=torch.contiguous_format).save_pretrained(settings.weights / "shared" / "vae")
    pictures = corpus.pixels[corpus.held_out]
    mean, deviation = encode(autoencoder, pictures)
    rebuilt = decode(autoencoder, mean * autoencoder.config.scaling_factor)
    error = ((rebuilt.double() - pictures.double()) / 255).square().mean()
    return {
        "held_out_psnr_db": (-10 * error.log10()).item(),
        "latent_noise_share": (deviation.square().mean().sqrt() / spread).item(),
        "latent_mean": mean.mean().item(),
        "scaling_factor": autoencoder.config.scaling_factor,
    }


def load_autoencoder(settings: TrainSettings) -> AutoencoderKL:
    """Loads the trained autoencoder in float32."""
    autoencoder = AutoencoderKL.from_pretrained(settings.weights / "shared" / "vae")
    return autoencoder.to(settings.device, torch.float32).eval().requires_grad_(False)
