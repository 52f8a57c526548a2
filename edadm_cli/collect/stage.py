"""`edadm collect`: samples at full precision and stores the tensors that calibration needs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from edadm_cli.artifacts import BuildSpec, CollectRecord, RunFolder, shared_keys
from edadm_cli.collect.task import recalled
from edadm_cli.config import CollectConfig
from edadm_cli.models.pipeline_calls.output_size import require_both_sides
from edadm_cli.models.pipeline_calls.prompts import read_prompts
from edadm_cli.models.registry import known_models
from edadm_cli.models.sources.locating import locate
from edadm_cli.processes import ALONE, Processes, join
from edadm_cli.progress import Reporter, SilentReporter

if TYPE_CHECKING:
    from edadm_cli.collect.building import Task


def run(
    config: CollectConfig, run_folder: RunFolder, *, force: bool = False, reporter: Reporter | None = None
) -> CollectRecord:
    """Samples `num_trajectories` trajectories and writes the `collect` artifact.

    Raises:
        InputError: The model or the prompt file is not usable, or sampling ends in values that are not
            finite.
        MachineError: The device is missing, its memory does not suffice, or the disk is full.
        UsageError: The configuration asks for something that the model does not have.
    """
    start = time.monotonic()
    reporter = reporter or SilentReporter()
    processes = join(config.device)
    with processes.together():
        # several processes, which start with torch, decide by the pipeline, so that they decide the same
        known = None if force or processes.count > 1 else recalled(config, run_folder)
        choices = known or _prepared(config, processes, reporter)
        spec = choices.build_spec()
        with run_folder.build(spec, force, processes) as build:
            is_done = build.up_to_date
            if not is_done:
                from edadm_cli.collect.building import Task, collect_trajectories  # imports torch

                task = choices if isinstance(choices, Task) else _prepared(config, processes, reporter)
                collect_trajectories(task, build, processes, reporter)
            artifact = build.finished()
    return CollectRecord(
        **shared_keys(run_folder.root, artifact, up_to_date=is_done, started=start, warnings=reporter.warnings),
        model=spec.model.id,
        num_steps=spec.config["num_steps"],
        num_trajectories=spec.config["num_trajectories"],
    )


def build_spec(config: CollectConfig, run_folder: RunFolder) -> BuildSpec:
    """Returns the description of the artifact that `run` would build, without sampling."""
    return (recalled(config, run_folder) or prepare(config, ALONE)).build_spec()


def artifact_name(config: CollectConfig) -> None:
    """Returns `None`: a run has one artifact of this kind."""
    return None


def prepare(config: CollectConfig, processes: Processes) -> Task:
    """Loads the model and decides what the configuration leaves open.

    A file that cannot be read, a model that does not exist and a height without a width are refused before anything
    large is imported or loaded.
    """
    given = None if config.prompts is None else read_prompts(config.prompts)
    location, entry = locate(config.model), known_models().get(config.model)
    require_both_sides({**(entry.call_arguments if entry else {}), **config.sizes()})
    from edadm_cli.collect.building import load_task  # imports torch

    return load_task(config, processes, given, location)


def _prepared(config: CollectConfig, processes: Processes, reporter: Reporter) -> Task:
    """Loads the model, and warns of what the user should know of it."""
    task = prepare(config, processes)
    for remark in task.remarks:
        reporter.warn(remark)
    return task
