"""`edadm reconstruct`: learns quantization parameters from a calibration set."""

from __future__ import annotations

import time
from collections.abc import Sequence

from edadm_cli.artifacts import BuildSpec, Coverage, Loss, ReconstructRecord, RunFolder, Units, shared_keys
from edadm_cli.config import ReconstructConfig
from edadm_cli.models.collected import CollectedRun
from edadm_cli.processes import ALONE, join
from edadm_cli.progress import Reporter, SilentReporter
from edadm_cli.reconstruct.task import resolve_task


def run(
    config: ReconstructConfig, run_folder: RunFolder, *, force: bool = False, reporter: Reporter | None = None
) -> ReconstructRecord:
    """Searches ranges and learns rounding and scales, unit by unit.

    Raises:
        InputError: There is no calibration set, or the model is not the one that it was collected from.
        UsageError: A pattern of the recipe matches no layer, a pattern of `units` matches no unit, or there are more
            processes than rows per step.
        EdadmError: A planned layer was not quantized.
    """
    started, reporter = time.monotonic(), reporter or SilentReporter()
    processes = join(config.device)
    with processes.together():
        task = resolve_task(config, run_folder, processes)
        with run_folder.build(task.build_spec(), force, processes) as build:
            is_done = build.up_to_date
            if not is_done:
                from edadm_cli.reconstruct.building import build_params  # imports torch

                build_params(task, build, reporter)
            artifact = build.finished()
    parts = [Units.load(artifact.within(place)) for place in CollectedRun.open(run_folder).places]
    return ReconstructRecord(
        **shared_keys(run_folder.root, artifact, up_to_date=is_done, started=started, warnings=reporter.warnings),
        bits=str(config.bits),
        recipe=config.recipe.name,
        units=sum(len(part.units) for part in parts),
        coverage=_total_coverage(parts),
        loss=_total_loss(parts),
    )


def build_spec(config: ReconstructConfig, run_folder: RunFolder) -> BuildSpec:
    """Returns the description of the artifact that `run` would build, without loading the model."""
    return resolve_task(config, run_folder, ALONE).build_spec()


def artifact_name(config: ReconstructConfig) -> str:
    """Returns the artifact's name within its kind."""
    return config.name


def _total_coverage(parts: Sequence[Units]) -> Coverage:
    """Returns the numbers of layers, summed over the denoisers."""
    coverages = [part.coverage for part in parts]
    return Coverage(
        planned=sum(each.planned for each in coverages),
        quantized=sum(each.quantized for each in coverages),
        kept=sum(each.kept for each in coverages),
    )


def _total_loss(parts: Sequence[Units]) -> Loss:
    """Returns the losses summed over the denoisers, and the largest share of weights that were undecided."""
    losses = [part.loss for part in parts if part.loss.first is not None]
    if len(losses) < 2:
        return losses[0] if losses else Loss()
    return Loss(
        first=sum(loss.first or 0.0 for loss in losses),
        last=sum(loss.last or 0.0 for loss in losses),
        soft=sum(loss.soft or 0.0 for loss in losses),
        undecided=max(loss.undecided or 0.0 for loss in losses),
    )
