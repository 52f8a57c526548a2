"""`edadm select`: chooses steps of the trajectories (one of each by default) for the calibration set."""

from __future__ import annotations

import time

from edadm_cli.artifacts import BuildSpec, RunFolder, Selection, SelectRecord, shared_keys
from edadm_cli.config import SelectConfig
from edadm_cli.models.collected import CollectedRun
from edadm_cli.progress import Reporter, SilentReporter
from edadm_cli.select.strategies import total_variation
from edadm_cli.select.task import resolve_task


def run(
    config: SelectConfig, run_folder: RunFolder, *, force: bool = False, reporter: Reporter | None = None
) -> SelectRecord:
    """Scores the steps, shares the samples out, and writes the `select` artifact.

    Raises:
        InputError: There is no `collect` artifact, or it is broken.
        UsageError: There is no such strategy, the trajectories have fewer samples than are requested, or a setting
            belongs to another strategy.
        MachineError: A strategy of another package cannot be loaded or returns no counts.
    """
    start = time.monotonic()
    reporter = reporter or SilentReporter()
    collected = CollectedRun.open(run_folder)
    tasks = {place: resolve_task(config, collected, place) for place in collected.places}
    with run_folder.build(tasks[""].build_spec(), force) as build:
        is_done = build.up_to_date
        if not is_done:
            from edadm_cli.select import building  # imports torch

            for place, task in tasks.items():
                building.build(task, build.path / place, reporter)
            build.commit()
        artifact = build.finished()
    selection = Selection.load(artifact)
    return SelectRecord(
        **shared_keys(run_folder.root, artifact, up_to_date=is_done, started=start, warnings=reporter.warnings),
        strategy=selection.strategy,
        counts=selection.counts,
        density_radius=selection.density_radius,
        variety_weight=selection.variety_weight,
        total_variation=total_variation(selection.counts),
        further_counts={place: Selection.load(artifact.within(place)).counts for place in collected.places if place},
    )


def build_spec(config: SelectConfig, run_folder: RunFolder) -> BuildSpec:
    """Returns the description of the artifact that `run` would build, without selecting."""
    return resolve_task(config, CollectedRun.open(run_folder)).build_spec()


def artifact_name(config: SelectConfig) -> None:
    """Returns `None`: a run has one artifact of this kind."""
    return None
