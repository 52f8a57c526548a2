"""`edadm evaluate`: compares an export's images with real images and with full precision of the same seeds."""

from __future__ import annotations

import time
from collections.abc import Mapping

from edadm_cli.artifacts import Artifact, BuildSpec, EvaluateRecord, Evaluation, Metric, RunFolder, shared_keys
from edadm_cli.config import EvaluateConfig
from edadm_cli.evaluate.adding import metrics_with_stored, spec_of
from edadm_cli.evaluate.notices import warn_of_limits
from edadm_cli.evaluate.plan import EvaluationPlan
from edadm_cli.evaluate.request import resolve
from edadm_cli.metrics.registry import in_order
from edadm_cli.processes import join
from edadm_cli.progress import Reporter, SilentReporter


def run(
    config: EvaluateConfig, run_folder: RunFolder, *, force: bool = False, reporter: Reporter | None = None
) -> EvaluateRecord:
    """Samples at both precisions, computes every metric that can be computed, and writes the `evaluate` artifact.

    An evaluation that differs only in its metrics is up to date if it has those that are asked for. If it lacks some,
    it is made again with the metrics of both; its images are not kept, so they are sampled again.

    Raises:
        InputError: The export is missing or broken, or the weights of a metric that was named are missing.
        UsageError: The model does not have a metric, prompts or guidance that was requested.
        MachineError: The device is missing, its memory does not suffice, or the disk is full.
    """
    start = time.monotonic()
    reporter = reporter or SilentReporter()
    processes = join(config.device)
    with processes.together():
        config = config.model_copy(update={"device": processes.device_name(config.device)})
        is_new = force or not processes.is_main
        metrics, adds = processes.share((config.metrics, False) if is_new else metrics_with_stored(config, run_folder))
        evaluation = _evaluation_plan(config.model_copy(update={"metrics": tuple(metrics)}), run_folder)
        if adds:
            reporter.note(f"The images of {config.name} are sampled again, because metrics are added to it.")
        with run_folder.build(spec_of(evaluation), force or adds, processes) as build:
            is_done = build.up_to_date
            if not is_done:
                from edadm_cli.evaluate.building import evaluate  # imports torch

                evaluate(evaluation, build, processes, reporter)
            artifact = build.finished()
    result = Evaluation.load(artifact)
    if is_done:
        warn_of_limits(result.skipped, result.cautions, reporter)
    return EvaluateRecord(
        **shared_keys(run_folder.root, artifact, up_to_date=is_done, started=start, warnings=reporter.warnings),
        bits=result.bits,
        metrics=_in_order(result.metrics),
        distance_to_full_precision=result.distance_to_full_precision,
        full_precision=_in_order(result.full_precision),
        skipped=result.skipped,
        verdict=result.verdict,
    )


def build_spec(config: EvaluateConfig, run_folder: RunFolder) -> BuildSpec:
    """Returns the specification of the artifact that `run` would build, without building it."""
    return spec_of(_evaluation_plan(config, run_folder))


def finished(config: EvaluateConfig, run_folder: RunFolder) -> Artifact | None:
    """Returns the evaluation on disk if it has every metric that is asked for; `None` if there is work to do.

    Raises:
        InputError: The evaluation on disk has other settings, or it is broken.
    """
    if not run_folder.names("evaluate"):
        return None
    metrics, adds = metrics_with_stored(config, run_folder)
    spec = build_spec(config.model_copy(update={"metrics": metrics}), run_folder)
    return None if adds else run_folder.finished(spec)


def artifact_name(config: EvaluateConfig) -> str:
    """Returns the artifact's name within its kind."""
    return config.name


def _evaluation_plan(config: EvaluateConfig, run: RunFolder) -> EvaluationPlan:
    return EvaluationPlan(resolve(config, run))


def _in_order(values: Mapping[str, Metric]) -> dict[str, Metric]:
    """Returns metrics in the order of the tables."""
    return {name: values[name] for name in in_order(values)}
