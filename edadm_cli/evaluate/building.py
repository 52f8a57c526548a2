"""Samples the images of an evaluation, compares them, and writes the `evaluate` artifact."""

from __future__ import annotations

from edadm_cli.artifacts import Build, OneStepError
from edadm_cli.errors import InputError
from edadm_cli.evaluate.evaluator import Evaluator
from edadm_cli.evaluate.full_precision import full_precision_images
from edadm_cli.evaluate.images import BATCH_PATTERN, SampledImages, sample_images
from edadm_cli.evaluate.notices import warn_of_limits
from edadm_cli.evaluate.one_step import one_step_error
from edadm_cli.evaluate.outcome import write_outcome
from edadm_cli.evaluate.plan import EvaluationPlan
from edadm_cli.evaluate.request import EvaluationRequest, require_machine
from edadm_cli.evaluate.verdict import verdict
from edadm_cli.processes import Processes
from edadm_cli.progress import Reporter


def evaluate(evaluation: EvaluationPlan, build: Build, processes: Processes, reporter: Reporter) -> None:
    """Samples images in all processes; the main process computes the metrics and writes the artifact.

    Raises:
        InputError: The export, the weights of a metric that was named, or the real images are not usable.
        UsageError: There is no such engine, or it takes no step cache.
        MachineError: The device is missing, its memory does not suffice, or the disk is full.
    """
    request = evaluation.request
    require_machine(request.config)
    evaluator = evaluation.load(request.device) if processes.is_main else None
    warn_of_limits(evaluation.selection.skipped, [], reporter)
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
    warn_of_limits({}, cautions, reporter)
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
