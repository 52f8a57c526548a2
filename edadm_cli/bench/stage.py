"""`edadm bench`: parity first, then speed, memory and size of a quantized denoiser against full precision.

The same command measures again and replaces its earlier result. A result with other settings (device, threads, sizes)
is replaced with `--force` only, as any artifact is.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from edadm_cli.artifacts import (
    Artifact,
    BenchRecord,
    BenchResult,
    Build,
    BuildSpec,
    RunFolder,
    shared_keys,
)
from edadm_cli.artifacts.manifest import read_manifest
from edadm_cli.bench.contenders.registry import require_peers
from edadm_cli.bench.measurement import Measurement
from edadm_cli.bench.plot import draw_contenders
from edadm_cli.bench.request import BenchRequest, name_of, resolve, settle_engine
from edadm_cli.config import BenchConfig
from edadm_cli.errors import InputError
from edadm_cli.progress import Reporter, SilentReporter

KIND = "bench"
PLOT_FILE = "bench.png"
_SCRATCH = "scratch"


def run(
    config: BenchConfig, run_folder: RunFolder, *, force: bool = False, reporter: Reporter | None = None
) -> BenchRecord:
    """Checks parity, measures, writes `bench/<bits>-<engine>-<device>`, and returns its record.

    Raises:
        MachineError: The device is missing, the engine cannot run on it, or a peer is not installed.
        InputError: There is no such export or model, or another result has the same place.
        EdadmError: The engine's results are too far from exact integers; nothing is timed then.
    """
    started, reporter = time.monotonic(), reporter or SilentReporter()
    device, _ = settle_engine(config)
    require_peers(config.against, device)  # before a model is loaded
    request = resolve(config, run_folder)
    spec = _build_spec(request)
    with run_folder.build(spec, force or _is_the_same(run_folder, spec)) as build:
        _build(request, build, reporter)
        artifact = build.artifact
        assert artifact is not None
    return BenchRecord(
        **shared_keys(run_folder.root, artifact, up_to_date=False, started=started, warnings=reporter.warnings),
        **dict(BenchResult.load(artifact)),
    )


def finished(config: BenchConfig, run_folder: RunFolder) -> Artifact | None:
    """Returns the measurement with the same settings, which `run` would replace; `None` where there is none.

    Raises:
        InputError: Another result has the same place, or there is no such export or model.
    """
    if not run_folder.names(KIND):
        return None
    spec = build_spec(config, run_folder)
    path = run_folder.path(KIND, spec.name)
    return Artifact(path, read_manifest(path)) if _is_the_same(run_folder, spec) else run_folder.finished(spec)


def build_spec(config: BenchConfig, run_folder: RunFolder) -> BuildSpec:
    """Returns the description of the artifact that `run` would write."""
    return _build_spec(resolve(config, run_folder))


def artifact_name(config: BenchConfig) -> str:
    """Returns the artifact's name: bit widths, engine and device, which depend on this machine if they are left open.

    Raises:
        MachineError: There is no such device.
        UsageError: There is no such engine.
    """
    device, engine = settle_engine(config)
    return name_of(config, engine, device)


def _build_spec(request: BenchRequest) -> BuildSpec:
    subject = request.subject
    return BuildSpec(KIND, request.name, request.identity_fields(), request.config.seed, subject.parents, subject.model)


def _is_the_same(run: RunFolder, spec: BuildSpec) -> bool:
    """Returns whether the existing result has the same settings, so that measuring again replaces it."""
    path = run.path(KIND, spec.name)
    if not run.has(KIND, spec.name):
        return False
    try:
        return read_manifest(path).identity == spec.identity
    except InputError:
        return False


def _build(request: BenchRequest, build: Build, reporter: Reporter) -> None:
    scratch = build.path / _SCRATCH
    try:
        result = _measure(request, scratch, reporter)
    finally:
        build.discard([_SCRATCH])
    record = BenchResult.model_validate(result)
    record.save(build.path)
    title = f"{request.subject.model.id}, batch {request.config.batch_sizes[0]}, {request.device}"
    draw_contenders(record.contenders, request.config.against, title, build.path / PLOT_FILE)
    build.commit(environment={"device": str(request.device), "machine": record.machine})


def _measure(request: BenchRequest, scratch: Path, reporter: Reporter) -> dict[str, Any]:
    with request.in_threads(), Measurement(request, scratch, reporter) as measurement:
        measurement.prepare()
        return measurement.measure()
