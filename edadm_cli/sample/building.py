"""Loads the export, on an engine if one is named, samples its images, and writes them as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from edadm_cli.artifacts import explained_os_errors
from edadm_cli.artifacts.files import atomic_path
from edadm_cli.engines.files import load_on_engine
from edadm_cli.engines.reference import use_arithmetic
from edadm_cli.engines.registry import engine as engine_of
from edadm_cli.errors import InputError
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.loading import load_model, resolve_device
from edadm_cli.models.pipeline_calls.sampling import Samples, sample
from edadm_cli.progress import Reporter
from edadm_cli.sample.pictures import FACTS_KEY, Picture
from edadm_cli.sample.task import Task


def write_pictures(task: Task, pictures: Sequence[Picture], reporter: Reporter) -> None:
    """Samples some images of a task, batch by batch, and writes each batch when it is complete.

    Raises:
        InputError: The export is broken.
        UsageError: There is no such engine.
        MachineError: The device is missing, its memory does not suffice, or the disk is full.
    """
    model = load(task, reporter)
    with explained_os_errors(task.folder):
        task.folder.mkdir(parents=True, exist_ok=True)
    size = task.config.batch_size
    with reporter.task(f"Sampling {task.config.bits}", len(pictures)) as advance:
        for start in range(0, len(pictures), size):
            batch = pictures[start : start + size]
            for picture, image in zip(batch, sample_pictures(model, batch).images, strict=True):
                _save_png(task.folder / picture.file, image, picture.facts())
            advance(len(batch))


def load(task: Task, reporter: Reporter) -> LoadedModel:
    """Loads the export, on an engine if one is named."""
    config, dtype = task.config, task.collected.dtype
    device = resolve_device(config.device)
    if config.engine is not None:
        engine = engine_of(config.engine)
        return load_on_engine(task.collected.run, task.export, engine, device, dtype, reporter)
    model = load_model(str(task.export.path), device, dtype, task.collected.entry)
    if config.arithmetic == "integer":
        counts = [use_arithmetic(each.denoiser, "integer") for each in model.by_denoiser().values()]
        if not sum(counts):
            raise InputError(f"{task.export.path} has no quantized layer, so there is nothing to compute in integers.")
    return model


def sample_pictures(model: LoadedModel, pictures: Sequence[Picture]) -> Samples:
    """Samples images that share steps and guidance."""
    first = pictures[0]
    prompts = None if first.prompt is None else [picture.prompt or "" for picture in pictures]
    samples = sample(
        model,
        seeds=[picture.seed for picture in pictures],
        prompts=prompts,
        num_steps=first.num_steps,
        guidance_scale=first.guidance_scale,
    )
    if not bool(torch.isfinite(samples.latents).all()):
        raise InputError(
            f"{model.ref.id} is broken: an image comes from values that are not finite.",
            hint="edadm reconstruct, with more bits or another recipe",
        )
    return samples


def _save_png(path: Path, image: torch.Tensor, facts: str) -> None:
    array = image.permute(1, 2, 0).numpy()  # [H, W, C]
    picture = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    info = PngInfo()
    info.add_itxt(FACTS_KEY, facts)
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=info)
