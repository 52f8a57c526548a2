"""`edadm sample`: samples images from an export into PNG files."""

from __future__ import annotations

import time

from edadm_cli.artifacts import Artifact, RunFolder, SampleRecord, shared_keys
from edadm_cli.config import SampleConfig
from edadm_cli.progress import Reporter, SilentReporter
from edadm_cli.sample.task import folder_of, resolve_task


def run(
    config: SampleConfig, run_folder: RunFolder, *, force: bool = False, reporter: Reporter | None = None
) -> SampleRecord:
    """Samples images with the seeds `seed, seed + 1, ...` into `samples/<bits>/`; existing images are kept.

    Raises:
        InputError: The export is missing or broken, or a file of another image has the same name.
        UsageError: There is no such engine, prompts are given for a model that takes none, or a scale for a model
            without guidance.
        MachineError: The device is missing, its memory does not suffice, or the disk is full.
    """
    started, reporter = time.monotonic(), reporter or SilentReporter()
    task = resolve_task(config, run_folder)
    missing = task.pictures if force else task.missing()
    if missing:
        from edadm_cli.sample.building import write_pictures  # imports torch

        write_pictures(task, missing, reporter)
    shared = shared_keys(
        run_folder.root, task.export, up_to_date=not missing, started=started, warnings=reporter.warnings
    )
    return SampleRecord(
        **{**shared, "artifact": str(task.folder)},
        images=tuple(str(task.folder / picture.file) for picture in task.pictures),
    )


def finished(config: SampleConfig, run_folder: RunFolder) -> Artifact | None:
    """Returns the folder of the images, with the export's manifest, if every image exists already.

    Raises:
        InputError: The export is missing or broken, or a file of another image has the same name.
    """
    if not folder_of(config, run_folder).is_dir():
        return None
    task = resolve_task(config, run_folder)
    return None if task.missing() else Artifact(task.folder, task.export.manifest)


def artifact_name(config: SampleConfig) -> str:
    """Returns the name of the folder within `samples/`."""
    return str(config.bits)
