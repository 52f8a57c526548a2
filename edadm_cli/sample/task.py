"""Decides the images of `edadm sample`; nothing here imports a library that computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edadm_cli.artifacts import Artifact, RunFolder
from edadm_cli.config import SampleConfig
from edadm_cli.errors import UsageError
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.registry import ModelEntry
from edadm_cli.models.shipped import shipped_prompts
from edadm_cli.sample import FOLDER
from edadm_cli.sample.pictures import Picture


@dataclass(frozen=True)
class Task:
    """The configuration of `sample` with every open setting decided.

    Attributes:
        config: The configuration.
        export: The quantized pipeline.
        collected: The full-precision pipeline that it was made from.
        pictures: The images, in the order of their seeds.
        folder: The folder of their files, whether it exists or not.
    """

    config: SampleConfig
    export: Artifact
    collected: CollectedRun
    pictures: list[Picture]
    folder: Path

    def missing(self) -> list[Picture]:
        """Returns the images that are not on disk.

        Raises:
            InputError: A file of another image has the same name.
        """
        return [picture for picture in self.pictures if not picture.is_in(self.folder)]


def folder_of(config: SampleConfig, run_folder: RunFolder) -> Path:
    """Returns the folder of the images, whether it exists or not."""
    return run_folder.root / FOLDER / str(config.bits)


def resolve_task(config: SampleConfig, run_folder: RunFolder) -> Task:
    """Decides seed, prompt and sampler of each image.

    Raises:
        InputError: The export or the collection is missing or broken.
        UsageError: An arithmetic is given beside an engine, prompts for a model that takes none, or a scale for a model
            without guidance.
    """
    if config.engine is not None and config.arithmetic == "integer":
        raise UsageError("--arithmetic integer runs the engine 'reference', so --engine cannot name another one.")
    export = run_folder.open("export", str(config.bits))
    collected = CollectedRun.open(run_folder)
    entry = collected.entry
    if config.guidance_scale is not None and collected.guidance_scale is None:
        raise UsageError(f"{entry.name} has no guidance, so --guidance-scale has no meaning for it.")
    prompts = _prompts(config, entry, collected.prompts)
    pictures = [
        Picture(
            seed=config.seed + index,
            prompt=None if prompts is None else prompts[index % len(prompts)],
            num_steps=config.num_steps or collected.num_steps,
            guidance_scale=collected.guidance_scale if config.guidance_scale is None else config.guidance_scale,
            arithmetic=config.arithmetic,
            export=export.identity,
            engine=config.engine,
        )
        for index in range(config.num_images)
    ]
    return Task(config, export, collected, pictures, folder_of(config, run_folder))


def _prompts(config: SampleConfig, entry: ModelEntry, collected: list[str] | None) -> Sequence[str] | None:
    """Returns the given prompts, else the model's own, else those that the run was collected with."""
    if collected is None:
        if config.prompt:
            raise UsageError(f"{entry.name} takes no prompts, so --prompt has no meaning for it.")
        return None
    if config.prompt:
        return config.prompt
    if entry.prompts is not None:
        return shipped_prompts(entry.prompts, config.num_images, config.seed)
    return collected
