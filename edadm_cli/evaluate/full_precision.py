"""Samples full-precision images, once per run: they do not depend on the bit width."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from edadm_cli.artifacts import BuildSpec, RunFolder, open_artifact
from edadm_cli.artifacts.locks import read_lock
from edadm_cli.errors import InputError
from edadm_cli.evaluate.images import SampledImages, sample_images
from edadm_cli.evaluate.request import EvaluationRequest
from edadm_cli.processes import Processes
from edadm_cli.progress import Reporter

KIND, NAME = "evaluate", "full-precision"


@contextmanager
def full_precision_images(
    request: EvaluationRequest, processes: Processes, reporter: Reporter
) -> Iterator[SampledImages]:
    """Yields the full-precision images of a request, sampled unless the run has them, and locked while in use.

    They are an artifact of their own, `evaluate/full-precision`. An artifact with other settings is replaced, because
    it can be sampled again.

    Raises:
        InputError: The model's files have changed, or another process is sampling them.
    """
    spec = BuildSpec(KIND, NAME, request.identity_fields(), request.config.seed, (), request.model)
    run = request.run
    path = run.path(KIND, NAME)
    with run.build(spec, processes.is_main and _is_to_be_replaced(run, spec, reporter), processes) as build:
        if not build.up_to_date:
            sample_images(
                request.sampling,
                build.path,
                request.load_full_precision,
                processes,
                reporter,
                "Sampling at full precision",
            )
            if processes.is_main:
                build.commit(environment={"processes": processes.count})
            processes.wait()
    with read_lock(path) if processes.is_main else nullcontext():
        yield SampledImages(path, request.sampling)


def _is_to_be_replaced(run: RunFolder, spec: BuildSpec, reporter: Reporter) -> bool:
    if not run.has(KIND, NAME):
        return False
    try:
        return open_artifact(run.path(KIND, NAME), KIND).identity != spec.identity
    except InputError as error:
        reporter.warn(f"The stored full-precision images are damaged and are sampled again: {error.message}")
        return True
