"""What an evaluation leaves behind: figures, distances image by image, and pictures to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edadm_cli.artifacts import Distance, Evaluation, Metric, ShownImage, save_json
from edadm_cli.evaluate.distances import num_identical, psnr, relative_l2
from edadm_cli.evaluate.grid import COLUMNS, image_grid, save_png, to_pil
from edadm_cli.evaluate.images import SampledImages

DISTANCES_FILE = "distances.json"
GRID_FILE = "grid.png"
IMAGES_FOLDER = "images"
NUM_SHOWN = 10
NUM_SHOWN_LARGE = 5
_LARGE = 128


def write_outcome(
    folder: Path,
    name: str,
    images: SampledImages,
    reference: SampledImages,
    figures: dict[str, Metric],
    reference_figures: dict[str, Metric],
    facts: dict[str, Any],
) -> None:
    """Compare two sets of images and write everything an evaluation leaves.

    Args:
        folder: Where the files go.
        name: What the quantized pipeline is called, such as `w4a8`.
        images: The quantized pipeline's images.
        reference: The full-precision images of the same seeds and prompts.
        figures: Figures of `images`.
        reference_figures: The same figures of `reference`.
        facts: More for the result file.
    """
    psnr_db, latent_rel_l2, identical = compare(images, reference)
    plan = images.plan
    save_json(
        folder / DISTANCES_FILE,
        {
            "seeds": list(plan.seeds),
            "prompts": None if plan.prompts is None else list(plan.prompts),
            "psnr_db": psnr_db.tolist(),
            "latent_rel_l2": latent_rel_l2.tolist(),
        },
    )
    shown = [
        image.model_copy(update={"psnr_db": psnr_of_image, "latent_rel_l2": distance})
        for image, psnr_of_image, distance in zip(
            _write_pictures(folder, name, images, reference), psnr_db.tolist(), latent_rel_l2.tolist(), strict=False
        )
    ]
    Evaluation(
        bits=name,
        metrics=figures,
        full_precision=reference_figures,
        distance_to_full_precision=Distance(psnr_db=float(psnr_db.mean()), latent_rel_l2=float(latent_rel_l2.mean())),
        num_images=len(images),
        num_identical_images=identical,
        num_steps=plan.num_steps,
        guidance_scale=plan.guidance_scale,
        grid=GRID_FILE,
        shown=tuple(shown),
        **facts,
    ).save(folder)


def compare(images: SampledImages, reference: SampledImages) -> tuple[Tensor, Tensor, int]:
    """Compare image by image.

    Returns:
        PSNR in dB and relative L2 of the latents, both float64 with shape `(N,)`, and the number of equal
        images.
    """
    values, distances, identical = [], [], 0
    for (_, batch), (_, other) in zip(images.batches(), reference.batches(), strict=True):
        values.append(psnr(batch.images, other.images))
        distances.append(relative_l2(batch.latents, other.latents))
        identical += num_identical(batch.images, other.images)
    return torch.cat(values), torch.cat(distances), identical


def _write_pictures(folder: Path, name: str, images: SampledImages, reference: SampledImages) -> list[ShownImage]:
    """Write the grid and the first images one by one; return what is shown, for a page to refer to."""
    is_large = max(images[0].shape[-2:]) >= _LARGE
    count = min(NUM_SHOWN_LARGE if is_large else NUM_SHOWN, len(images))
    quantized, full = images.first(count), reference.first(count)
    prompts = images.plan.prompts
    shown = []
    for place in range(count):
        names = {kind: f"{IMAGES_FOLDER}/{place:02d}-{kind}.png" for kind in ("full-precision", "quantized")}
        save_png(folder / names["full-precision"], to_pil(full[place]))
        save_png(folder / names["quantized"], to_pil(quantized[place]))
        shown.append(
            ShownImage(
                seed=images.plan.seeds[place],
                prompt=None if prompts is None else prompts[place],
                full_precision=names["full-precision"],
                quantized=names["quantized"],
            )
        )
    captions = [image.prompt or f"seed {image.seed}" for image in shown]
    columns = NUM_SHOWN_LARGE if is_large else COLUMNS
    save_png(folder / GRID_FILE, image_grid({"full precision": full, name: quantized}, captions, columns))
    return shown
