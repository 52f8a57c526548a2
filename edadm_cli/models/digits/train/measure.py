r"""Measures full-precision models: prompt accuracy, and Fréchet distances of digit features.

$$ d^2 = \lVert \mu_1 - \mu_2 \rVert^2
    + \operatorname{tr}(\Sigma_1 + \Sigma_2 - 2 (\Sigma_1 \Sigma_2)^{1/2}) $$

The distance is not an Inception FID. Its features come from the digit classifier, so its values can be compared only
with each other.

References:
    Heusel et al., GANs Trained by a Two Time-Scale Update Rule (arXiv 1706.08500), equation 6.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import torch
from diffusers import DDIMPipeline, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from edadm_cli.models.digits.classifier import DigitClassifier, load_classifier
from edadm_cli.models.digits.data import label_of_prompt, model_folder, prompts, real_statistics
from edadm_cli.models.digits.train.settings import TrainSettings, seed_of
from edadm_cli.models.real_statistics import KINDS

NUM_STEPS = 20
GUIDANCE_SCALE = 2.0
_BATCH = 250
_GRID_COLUMNS = 20
_GRID_IMAGES = 200


@torch.inference_mode()
def classify(classifier: DigitClassifier, images: Tensor) -> Tensor:
    """Returns the logits `(N, 10)` of uint8 images with shape `(N, 1, S, S)`, on the CPU."""
    device = next(classifier.parameters()).device
    return torch.cat([classifier(part.to(device).float() / 255).logits.cpu() for part in images.split(1000)])


@torch.inference_mode()
def feature_statistics(classifier: DigitClassifier, images: Tensor) -> dict[str, Tensor]:
    """Returns the mean and covariance, in float64, of both kinds of features of uint8 images `(N, 1, S, S)`."""
    device = next(classifier.parameters()).device
    features = [classifier(part.to(device).float() / 255) for part in images.split(1000)]
    statistics: dict[str, Tensor] = {}
    for kind in KINDS:
        values = torch.cat([getattr(part, kind).flatten(1) for part in features]).double().cpu()
        statistics |= {f"{kind}_mean": values.mean(dim=0), f"{kind}_cov": torch.cov(values.T)}
    return statistics


def frechet_distance(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> float:
    r"""Returns $d^2$ of two normal distributions, from float64 means `(D,)` and covariances `(D, D)`.

    The trace of $(\Sigma_1 \Sigma_2)^{1/2}$ is the sum of the square roots of the eigenvalues of the symmetric matrix
    $\Sigma_1^{1/2} \Sigma_2 \Sigma_1^{1/2}$.
    """
    values, vectors = torch.linalg.eigh(cov_1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    middle = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp(min=0).sqrt().sum()
    return float((mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * middle)


def frechet_distances(real: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """Returns the Fréchet distance of both kinds of features."""
    return {
        f"frechet_{kind}": frechet_distance(
            real[f"{kind}_mean"], real[f"{kind}_cov"], other[f"{kind}_mean"], other[f"{kind}_cov"]
        )
        for kind in KINDS
    }


def sample_text_to_image(folder: Path, settings: TrainSettings, captions: list[str]) -> Tensor:
    """Samples one image per caption with PNDM, and returns them as uint8 with shape `(N, 1, 32, 32)`."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder).to(settings.device, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    batches: list[Tensor] = []
    for start in range(0, len(captions), _BATCH):
        part = captions[start : start + _BATCH]
        images = pipeline(
            part, num_inference_steps=NUM_STEPS, guidance_scale=GUIDANCE_SCALE, output_type="pt",
            generator=_generators(settings, start, len(part)),
        ).images  # fmt: skip
        batches.append(_to_levels(images.mean(dim=1, keepdim=True)))
    return torch.cat(batches)


def sample_pixels(folder: Path, settings: TrainSettings, num_steps: int) -> Tensor:
    """Samples images with DDIM at eta 0, and returns them as uint8 with shape `(N, 1, 16, 16)`."""
    pipeline = DDIMPipeline.from_pretrained(folder).to(settings.device, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    batches: list[Tensor] = []
    for start in range(0, settings.num_images, _BATCH):
        count = min(_BATCH, settings.num_images - start)
        images = pipeline(
            batch_size=count, num_inference_steps=num_steps, output_type="pt",
            generator=_generators(settings, start, count),
        ).images  # fmt: skip
        batches.append(_to_levels(images))
    return torch.cat(batches)


def measure_text_to_image(settings: TrainSettings, root: Path) -> dict[str, Any]:
    """Samples `digits-sd`, writes a grid of images, and returns the prompt accuracy and the Fréchet distances."""
    captions = prompts(settings.num_images, settings.seed)
    images = sample_text_to_image(model_folder("digits-sd", root), settings, captions)
    write_grid(images, settings.samples / "digits-sd.png")
    classifier = load_classifier(settings.device, root)
    labels = torch.tensor([label_of_prompt(caption) for caption in captions])
    right = classify(classifier, images).argmax(dim=1) == labels
    distances = frechet_distances(real_statistics(32, root), feature_statistics(classifier, images))
    setup = {
        "num_images": len(captions), "scheduler": "PNDM", "num_steps": NUM_STEPS,
        "guidance_scale": GUIDANCE_SCALE,
    }  # fmt: skip
    return setup | {"prompt_accuracy": right.double().mean().item()} | distances


def measure_pixels(settings: TrainSettings, root: Path) -> dict[str, Any]:
    """Samples `digits-ddpm` with 20 and 50 steps, writes grids of images, and returns the Fréchet distances."""
    classifier = load_classifier(settings.device, root)
    measured: dict[str, Any] = {"num_images": settings.num_images, "scheduler": "DDIM", "eta": 0.0}
    for num_steps in (20, 50):
        images = sample_pixels(model_folder("digits-ddpm", root), settings, num_steps)
        write_grid(images, settings.samples / f"digits-ddpm-{num_steps}.png")
        confidence = classify(classifier, images).softmax(dim=1).amax(dim=1).mean().item()
        distances = frechet_distances(real_statistics(16, root), feature_statistics(classifier, images))
        measured[f"{num_steps}_steps"] = {"mean_confidence": confidence} | distances
    return measured


def write_grid(images: Tensor, path: Path) -> None:
    """Writes the first of the uint8 images `(N, 1, S, S)` as rows of twenty in one PNG file."""
    count = min(_GRID_IMAGES, len(images) // _GRID_COLUMNS * _GRID_COLUMNS)
    size = images.shape[-1]
    rows = images[:count].view(-1, _GRID_COLUMNS, size, size).permute(0, 2, 1, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(numpy.asarray(rows.reshape(-1, _GRID_COLUMNS * size))).save(path)


def _to_levels(images: Tensor) -> Tensor:
    return (images.float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)


def _generators(settings: TrainSettings, start: int, count: int) -> list[torch.Generator]:
    """Returns one generator per image, on the CPU, so that the noise depends on neither batch size nor device."""
    seeds = [seed_of(settings.seed, "image", index) for index in range(start, start + count)]
    return [torch.Generator().manual_seed(seed) for seed in seeds]
