"""`edadm evaluate`: compares an export's images with real images and with full precision of the same seeds.

Unlike the stages before it, this one imports torch to find that it is up to date: its identity can hold a hash of the
digit classifier's tensors, and which metrics it computes follows from the real images and their statistics.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from edadm_cli.artifacts import (
    Artifact,
    Build,
    BuildSpec,
    EvaluateRecord,
    Evaluation,
    Metric,
    OneStepError,
    RunFolder,
    shared_keys,
)
from edadm_cli.config import EvaluateConfig
from edadm_cli.errors import InputError
from edadm_cli.evaluate.adding import metrics_with_stored, spec_of
from edadm_cli.evaluate.full_precision import full_precision_images
from edadm_cli.evaluate.images import BATCH_PATTERN, SampledImages, sample_images
from edadm_cli.evaluate.one_step import one_step_error
from edadm_cli.evaluate.outcome import write_outcome
from edadm_cli.evaluate.plan import EvaluationPlan
from edadm_cli.evaluate.request import EvaluationRequest, resolve
from edadm_cli.evaluate.verdict import verdict
from edadm_cli.processes import Processes, join
from edadm_cli.progress import Reporter, SilentReporter

if TYPE_CHECKING:
    from edadm_cli.evaluate.evaluator import Evaluator


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
                _evaluate(evaluation, build, processes, reporter)
            artifact = build.finished()
    result = Evaluation.load(artifact)
    if is_done:
        _warn(result.skipped, result.cautions, reporter)
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


def _evaluate(evaluation: EvaluationPlan, build: Build, processes: Processes, reporter: Reporter) -> None:
    """Samples images in all processes; the main process computes the metrics."""
    request = evaluation.request
    evaluator = evaluation.load(request.device) if processes.is_main else None
    _warn(evaluation.selection.skipped, [], reporter)
    with full_precision_images(request, processes, reporter) as reference:
        images = sample_images(
            request.sampling,
            build.path,
            request.load_sampler,
            processes,
            reporter,
            f"Sampling {request.config.bits}",
        )
        if evaluator is not None:
            _compare(evaluation, evaluator, build, images, reference, reporter)
            build.discard(path.name for path in sorted(build.path.glob(BATCH_PATTERN)))
            build.commit(environment={"processes": processes.count})
    processes.wait()


def _compare(
    evaluation: EvaluationPlan,
    evaluator: Evaluator,
    build: Build,
    images: SampledImages,
    reference: SampledImages,
    reporter: Reporter,
) -> None:
    request, skipped = evaluation.request, dict(evaluation.selection.skipped)
    images.require_shapes_of(reference)
    with reporter.task("Comparing", 4) as advance:
        full_precision = evaluator.values(reference, reference, paired=False)
        advance(1)
        values = evaluator.values(images, reference, paired=False)
        advance(1)
        distances = evaluator.values(images, reference, paired=True)
        advance(1)
        one_step = _one_step_error(request, skipped, reporter)
        advance(1)
    cautions = evaluator.cautions(len(images))
    _warn({}, cautions, reporter)
    sentences = verdict(images, reference, one_step, request.config.cache)
    facts = {
        "skipped": skipped,
        "cautions": tuple(cautions),
        "real": None if evaluation.real is None else evaluation.real.name,
        "dtype": request.dtype,
        "one_step": one_step,
        "verdict": tuple(sentences),
    }
    write_outcome(build.path, str(request.config.bits), images, reference, values, full_precision, distances, facts)


def _one_step_error(request: EvaluationRequest, skipped: dict[str, str], reporter: Reporter) -> OneStepError | None:
    try:
        return one_step_error(request.sampling, request.load_full_precision, request.load_quantized)
    except InputError as error:
        skipped["one_step_rel_l2"] = error.message
        reporter.warn(f"Without one_step_rel_l2: {error.message}")
        return None


def _warn(skipped: Mapping[str, str], cautions: Iterable[str], reporter: Reporter) -> None:
    """Warns of the metrics that are left out, once per reason, and of those with a limited meaning."""
    for reason in sorted(set(skipped.values())):
        names = ", ".join(sorted(name for name, why in skipped.items() if why == reason))
        reporter.warn(f"Without {names}: {reason}")
    for caution in cautions:
        reporter.warn(caution)


def _in_order(values: Mapping[str, Metric]) -> dict[str, Metric]:
    """Returns metrics in the order of the tables."""
    from edadm_cli.metrics.registry import in_order

    return {name: values[name] for name in in_order(values)}
