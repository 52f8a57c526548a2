"""An engine's files of an export, as an artifact of their own: `engine/<bits>-<engine>`, made from `export/<bits>`.

Files added to a finished export would change what its manifest promises. They can be had again at any time, so those
that are damaged or outdated are replaced.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from edadm_cli.artifacts import Artifact, RunFolder, open_artifact
from edadm_cli.artifacts.store import Plan
from edadm_cli.engines.base import Engine, EngineOptions, FileEngine
from edadm_cli.engines.pipeline import put_on_engine
from edadm_cli.errors import InputError, UsageError
from edadm_cli.models.calibration import CalibrationSet
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.loading import LoadedModel, load_model
from edadm_cli.models.registry import ModelEntry
from edadm_cli.progress import Reporter

KIND = "engine"


class FileWriter(Protocol):
    """What writes files of an export: an engine that has files, or a format that other programs read."""

    name: ClassVar[str]
    files_format: ClassVar[int]

    def save(
        self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: EngineOptions, folder: Path
    ) -> None:
        """Write the files into an empty folder."""


def engine_artifact(
    run: RunFolder, export: Artifact, engine: FileWriter, reporter: Reporter, force: bool = False
) -> Artifact:
    """The engine's files of an export: found, or made.

    Raises:
        UsageError: The engine cannot express the denoiser.
        InputError: Another process is making them.
    """
    bits = export.path.name
    name = f"{bits}-{engine.name}"
    fields = {"bits": bits, "engine": engine.name, "format": engine.files_format}
    plan = Plan(KIND, name, fields, 0, (export,), export.manifest.model)
    found = None if force else _current(run, plan, reporter)
    if found is not None:
        return found
    with run.build(plan, force=run.has(KIND, name)) as build:
        if build.artifact is not None:
            return build.artifact
        reporter.note(f"{name}: converting the denoiser")
        device = torch.device("cpu")
        model = load_model(str(export.path), device, torch.float32, _entry(run))
        args, kwargs = example(run, device, torch.float32)
        engine.save(model.denoiser, args, kwargs, EngineOptions(device), build.path)
        return build.commit()


def load_on_engine(
    run: RunFolder, export: Artifact, engine: Engine, device: torch.device, dtype: torch.dtype, reporter: Reporter
) -> LoadedModel:
    """The exported pipeline with its denoiser on an engine.

    Args:
        run: The run of the export.
        export: The quantized pipeline.
        engine: What runs the denoiser; from its files, where it has any.
        device: Of the pipeline.
        dtype: Of the pipeline, and of what the engine does not quantize.
        reporter: Told of a conversion.

    Raises:
        MachineError: The engine cannot run here.
    """
    engine.require(device)
    model = load_model(str(export.path), device, dtype, _entry(run))
    options = EngineOptions(device, dtype)
    if isinstance(engine, FileEngine):
        compiled = engine.load(engine_artifact(run, export, engine, reporter).path, options)
    else:
        compiled = engine.compile(model.denoiser, *example(run, device, dtype), options)
    return put_on_engine(model, compiled)


def file_engine(engine: Engine) -> FileEngine:
    """The engine, if it has files.

    Raises:
        UsageError: It has none.
    """
    if not isinstance(engine, FileEngine):
        raise UsageError(
            f"The engine '{engine.name}' keeps no files; it loads an export as it is.",
            hint=f"edadm sample --engine {engine.name}",
        )
    return engine


def example(run: RunFolder, device: torch.device, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call of the denoiser as the pipeline makes it for one image."""
    return CalibrationSet.load(run.open("select")).call(range(1), device, dtype)


def _entry(run: RunFolder) -> ModelEntry:
    return CollectedRun.open(run).entry


def _current(run: RunFolder, plan: Plan, reporter: Reporter) -> Artifact | None:
    """The files that are there, if they are of this export and intact."""
    if not run.has(KIND, plan.name):
        return None
    try:
        found = open_artifact(run.path(KIND, plan.name), KIND)
    except InputError as error:
        reporter.warn(f"The kept files of the engine are damaged and made again: {error.message}")
        return None
    return found if found.identity == plan.identity else None
