"""`edadm evaluate`: an export's images against real images, and against full precision of the same seeds."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from edadm_cli.artifacts import (
    Build,
    EvaluateRecord,
    Evaluation,
    Metric,
    Plan,
    RunFolder,
    shared_keys,
)
from edadm_cli.config import EvaluateConfig
from edadm_cli.evaluate.full_precision import full_precision_images
from edadm_cli.evaluate.images import BATCH_PATTERN, SampledImages, sample_images
from edadm_cli.evaluate.metrics import METRICS
from edadm_cli.evaluate.outcome import write_outcome
from edadm_cli.evaluate.request import Request, resolve
from edadm_cli.processes import Processes, join
from edadm_cli.progress import Reporter, SilentReporter

if TYPE_CHECKING:
    from edadm_cli.evaluate.judging import Judging
    from edadm_cli.evaluate.quality import Judge


def run(
    config: EvaluateConfig, run_folder: RunFolder, *, force: bool = False, reporter: Reporter | None = None
) -> EvaluateRecord:
    """Sample at both precisions, compute every figure that can be had, and write the `evaluate` artifact.

    Raises:
        InputError: What is evaluated is missing or broken, or a figure asked for by name lacks its weights.
        UsageError: A figure, prompts or guidance are asked for that the model does not have.
        MachineError: The device is not there or its memory does not suffice, or the disk is full.
    """
    start = time.monotonic()
    reporter = reporter or SilentReporter()
    processes = join(config.device)
    with processes.together():
        judging = _judging(config.model_copy(update={"device": processes.device_name(config.device)}), run_folder)
        with run_folder.build(_plan(judging), force, processes) as build:
            is_done = build.up_to_date
            if not is_done:
                _evaluate(judging.request, judging, build, processes, reporter)
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
    )


def plan(config: EvaluateConfig, run_folder: RunFolder) -> Plan:
    """What `run` would build: whether it is there already is known without building it."""
    return _plan(_judging(config, run_folder))


def artifact_name(config: EvaluateConfig) -> str:
    """Returns the artifact's name within its kind."""
    return config.name


def _judging(config: EvaluateConfig, run: RunFolder) -> Judging:
    from edadm_cli.evaluate.judging import Judging

    return Judging(resolve(config, run))


def _plan(judging: Judging) -> Plan:
    request = judging.request
    config = request.config
    return Plan(
        kind="evaluate",
        name=config.name,
        config={**config.identity_fields(), **request.identity_fields(), **judging.identity_fields()},
        seed=config.seed,
        parents=(request.export,),
        model=request.model,
    )


def _evaluate(request: Request, judging: Judging, build: Build, processes: Processes, reporter: Reporter) -> None:
    """Sample in all processes; the main one compares."""
    name = str(request.config.bits)
    judge = judging.load(request.device) if processes.is_main else None
    _warn(judging.choice.skipped, [], reporter)
    with full_precision_images(request, processes, reporter) as reference:
        images = sample_images(
            request.sampling, build.path, request.load_quantized, processes, reporter, f"Sampling {name}"
        )
        if judge is not None:
            _compare(request, judging, judge, build, images, reference, reporter)
            build.discard(path.name for path in sorted(build.path.glob(BATCH_PATTERN)))
            build.commit(environment={"processes": processes.count})
    processes.wait()


def _compare(
    request: Request,
    judging: Judging,
    judge: Judge,
    build: Build,
    images: SampledImages,
    reference: SampledImages,
    reporter: Reporter,
) -> None:
    with reporter.task("Comparing", 2) as advance:
        reference_figures = judge.figures(reference)
        advance(1)
        figures = judge.figures(images)
        advance(1)
    cautions = judge.cautions(len(images))
    _warn({}, cautions, reporter)
    facts = {
        "skipped": judging.choice.skipped,
        "cautions": tuple(cautions),
        "real": None if judging.real is None else judging.real.name,
        "dtype": request.dtype,
    }
    write_outcome(build.path, str(request.config.bits), images, reference, figures, reference_figures, facts)


def _warn(skipped: Mapping[str, str], cautions: Iterable[str], reporter: Reporter) -> None:
    """Name the figures that are missing, once for each reason, and say what speaks against the others."""
    for reason in sorted(set(skipped.values())):
        names = ", ".join(sorted(name for name, why in skipped.items() if why == reason))
        reporter.warn(f"Without {names}: {reason}")
    for caution in cautions:
        reporter.warn(caution)


def _in_order(figures: dict[str, Metric]) -> dict[str, Metric]:
    """Figures as people read them: distances first, what needs prompts last."""
    order = [name for specs in METRICS.values() for name in specs]
    known = [name for name in order if name in figures]
    return {name: figures[name] for name in (*known, *sorted(set(figures) - set(known)))}
