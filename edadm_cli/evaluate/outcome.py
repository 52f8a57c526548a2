"""Writes the results of an evaluation: metrics, distances per image, and images to look at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edadm_cli.artifacts import Distance, Evaluation, Metric, OneStepError, ShownImage, save_json
from edadm_cli.evaluate.grid import COLUMNS, image_grid, save_png, to_pil
from edadm_cli.evaluate.images import SampledImages
from edadm_cli.metrics.base import Value
from edadm_cli.metrics.distances import num_identical

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
    values: Mapping[str, Value],
    full_precision: Mapping[str, Value],
    distances: Mapping[str, Value],
    facts: dict[str, Any],
) -> None:
    """Writes the results of an evaluation.

    Args:
        folder: The folder of the files.
        name: Name of the quantized pipeline, such as `w4a8`.
        images: The quantized pipeline's images.
        reference: The full-precision images of the same seeds and prompts.
        values: Metrics of `images`.
        full_precision: The same metrics of `reference`.
        distances: Paired metrics of both.
        facts: Further fields of the result file.
    """
    plan = images.plan
    save_json(
        folder / DISTANCES_FILE,
        {
            "seeds": list(plan.seeds),
            "prompts": None if plan.prompts is None else list(plan.prompts),
            **{key: list(value.per_image) for key, value in distances.items()},
        },
    )
    shown = [
        image.model_copy(update={key: distances[key].per_image[place] for key in ("psnr_db", "latent_rel_l2")})
        for place, image in enumerate(_write_pictures(folder, name, images, reference))
    ]
    one_step: OneStepError | None = facts.get("one_step")
    distance: dict[str, Any] = {key: value.value for key, value in distances.items()}
    if one_step is not None:
        distance |= {"one_step_rel_l2": one_step.rel_l2, "guided_one_step_rel_l2": one_step.guided_rel_l2}
    Evaluation(
        bits=name,
        metrics=_metrics(values),
        full_precision=_metrics(full_precision),
        distance_to_full_precision=Distance(**distance),
        num_images=len(images),
        num_identical_images=_num_identical(images, reference),
        num_steps=plan.num_steps,
        guidance_scale=plan.guidance_scale,
        grid=GRID_FILE,
        shown=tuple(shown),
        **facts,
    ).save(folder)


def _metrics(values: Mapping[str, Value]) -> dict[str, Metric]:
    return {
        name: Metric(value=value.value, features=value.features, num_images=value.num_images)
        for name, value in values.items()
    }


def _num_identical(images: SampledImages, reference: SampledImages) -> int:
    """Returns the number of images that equal those of full precision in every pixel."""
    batches = zip(images.batches(), reference.batches(), strict=True)
    return sum(num_identical(batch.images, other.images) for (_, batch), (_, other) in batches)


def _write_pictures(folder: Path, name: str, images: SampledImages, reference: SampledImages) -> list[ShownImage]:
    """Writes the grid and the first images as files; returns their list for the report."""
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
