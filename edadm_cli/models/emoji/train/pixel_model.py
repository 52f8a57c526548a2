"""Writes what the stage `ddpm-emoji` leaves: a pipeline folder, statistics of the training pictures, and a sheet."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from edadm_cli.models.emoji.data import STATISTICS_FILE
from edadm_cli.models.emoji.encoder import PictureEncoder, load_picture_encoder
from edadm_cli.models.emoji.train.corpus import Pictures
from edadm_cli.models.emoji.train.measure import PIXEL_STEPS, frechet, generate_pixels, write_sheet
from edadm_cli.models.emoji.train.networks import pixel_scheduler
from edadm_cli.models.emoji.train.package import statistics_of
from edadm_cli.models.emoji.train.packed import small_pictures
from edadm_cli.models.emoji.train.pipelines import PIXEL
from edadm_cli.models.emoji.train.settings import TrainSettings
from edadm_cli.models.real_statistics import pack

_SHEET, _SMALL_SHEET = 100, 4


def finish_pixels(network: nn.Module, pictures: Pictures, settings: TrainSettings, count: int) -> dict[str, Any]:
    """Writes the folder `ddpm-emoji`, which `edadm collect --model` takes, and a sheet of 100 pictures.

    The folder is a diffusers pipeline. It also holds the statistics of the 32x32 training pictures in the features of
    the shipped picture encoder, from which `benchmarks/emoji.py` computes Fréchet distances.

    Args:
        network: The denoiser with its averaged weights.
        pictures: The pictures that it was trained on.
        settings: The run's settings.
        count: The number of pictures that are generated and compared with the training pictures; 0 compares nothing.

    Returns:
        The Fréchet distances of generated and of real pictures to the training pictures, and their number.
    """
    folder = settings.weights / PIXEL
    pipeline = DDIMPipeline(network.eval(), pixel_scheduler())
    pipeline.save_pretrained(folder)
    real = small_pictures(pictures.pixels[pictures.train])
    encoder = load_picture_encoder(settings.device)
    save_file(pack(statistics_of(encoder, real)), folder / STATISTICS_FILE)
    shown = _SMALL_SHEET if settings.small else _SHEET
    generated = generate_pixels(pipeline, max(shown, count))
    write_sheet(generated[:shown], settings.out / "samples" / f"{PIXEL}.png")
    if not count:
        return {}
    features = _features(encoder, real)
    order = torch.randperm(len(real), generator=settings.generator(PIXEL, "floor", device="cpu"))[:count]
    return {
        "pictures": count,
        "steps": PIXEL_STEPS,
        "frechet_to_train": frechet(_features(encoder, generated[:count].to(settings.device)), features),
        "frechet_real_to_train": frechet(features[order.to(settings.device)], features),
    }


@torch.inference_mode()
def _features(encoder: PictureEncoder, pixels: Tensor) -> Tensor:
    return torch.cat([encoder(part.float() / 255).features for part in pixels.split(500)])
