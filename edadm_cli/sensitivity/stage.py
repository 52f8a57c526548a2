"""`edadm sensitivity`: measures and ranks the rise of the final error per layer and number of bits."""

from __future__ import annotations

import time

from edadm_cli.artifacts import BuildSpec, RunFolder, Sensitivity, SensitivityRecord, shared_keys
from edadm_cli.config import SensitivityConfig
from edadm_cli.progress import Reporter, SilentReporter
from edadm_cli.sensitivity.task import resolve_task


def run(
    config: SensitivityConfig, run_folder: RunFolder, *, force: bool = False, reporter: Reporter | None = None
) -> SensitivityRecord:
    """Measures every layer at every number of bits, and writes the `sensitivity` artifact.

    Raises:
        InputError: There is no calibration set, or the model is not the one that it was collected from.
        UsageError: A pattern of the recipe matches no layer.
    """
    started, reporter = time.monotonic(), reporter or SilentReporter()
    task = resolve_task(config, run_folder)
    with run_folder.build(task.build_spec(), force) as build:
        is_done = build.up_to_date
        if not is_done:
            from edadm_cli.sensitivity.building import measure  # imports torch

            measure(task, build, reporter)
        artifact = build.finished()
    result = Sensitivity.load(artifact)
    lowest = min(config.weight_bits)
    return SensitivityRecord(
        **shared_keys(run_folder.root, artifact, up_to_date=is_done, started=started, warnings=reporter.warnings),
        layers=len(result.layers),
        most_sensitive={layer.name: layer.weight_errors[lowest] for layer in result.ranked(lowest)[:10]},
    )


def build_spec(config: SensitivityConfig, run_folder: RunFolder) -> BuildSpec:
    """Returns the description of the artifact that `run` would build."""
    return resolve_task(config, run_folder).build_spec()


def artifact_name(config: SensitivityConfig) -> None:
    """Returns `None`: a run has one artifact of this kind."""
