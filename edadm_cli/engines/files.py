"""Keeps an engine's files of an export in a separate artifact: `engine/<bits>-<engine>`, made from `export/<bits>`.

Files that are added to a finished export would make it differ from its manifest. An engine's files can be made again at
any time, so damaged or outdated ones are replaced.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from edadm_cli.artifacts import Artifact, RunFolder, open_artifact
from edadm_cli.artifacts.store import BuildSpec
from edadm_cli.engines.base import CompiledDenoiser, Engine, EngineOptions, FileEngine
from edadm_cli.engines.isolation import IsolatedProcess, ProcessLostError, pack, unpack
from edadm_cli.engines.pipeline import put_on_engine
from edadm_cli.engines.results import compile_denoiser, load_denoiser
from edadm_cli.errors import InputError, UsageError
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.denoiser_calls.calibration import CalibrationSet
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.loading import load_model
from edadm_cli.models.registry import ModelEntry
from edadm_cli.progress import Reporter, long_step

KIND = "engine"


class FileWriter(Protocol):
    """Writes files of an export. It is an engine with files, or a file format that other programs read."""

    name: ClassVar[str]
    files_format: ClassVar[int]

    def save(
        self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: EngineOptions, folder: Path
    ) -> None:
        """Writes the files into an empty folder."""


def engine_artifact(
    run: RunFolder, export: Artifact, engine: FileWriter, reporter: Reporter, force: bool = False
) -> Artifact:
    """Returns the artifact with the engine's files of an export, and makes it if it is missing, damaged or outdated.

    Each denoiser has files of its own: those of the first one lie in the artifact's folder, and those of every further
    one in a folder with the name of the component. A denoiser in new files is called once before the artifact is
    returned, if the engine runs on this machine.

    Args:
        run: The run of the export.
        export: The quantized pipeline.
        engine: The writer of the files.
        reporter: It receives a note if the denoiser is converted.
        force: Whether to make the files again in any case.

    Raises:
        UsageError: The engine cannot express the denoiser.
        InputError: Another process is making the files.
        MachineError: The engine's library crashed at the first call.
    """
    bits = export.path.name
    name = f"{bits}-{engine.name}"
    fields = {"bits": bits, "engine": engine.name, "format": engine.files_format}
    spec = BuildSpec(KIND, name, fields, 0, (export,), export.manifest.model)
    current = None if force else _current(run, spec, reporter)
    if current is not None:
        return current
    with run.build(spec, force=run.has(KIND, name)) as build:
        if build.artifact is not None:
            return build.artifact
        reporter.note(f"{name}: converting the denoiser")
        device = torch.device("cpu")
        model = load_model(str(export.path), device, torch.float32, _entry(run))
        options = EngineOptions(device)
        for place, each in model.by_denoiser().items():
            folder = build.path / place
            folder.mkdir(exist_ok=True)
            args, kwargs = example(run, device, torch.float32, place)
            with long_step(lambda: f"converting the denoiser for the engine '{engine.name}'"):
                engine.save(each.denoiser, args, kwargs, options, folder)
            if isinstance(engine, FileEngine) and engine.refusal(device) is None:
                require_first_call(engine, folder, args, kwargs, options)
        return build.commit()


def compile_new(
    engine: Engine, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: EngineOptions
) -> CompiledDenoiser:
    """Compiles a denoiser that has no files in a run.

    An engine with files writes them to a temporary folder, and calls the denoiser once in a separate process, before it
    loads the denoiser in this process.

    Raises:
        MachineError: The engine's library crashed at the first call.
    """
    if not isinstance(engine, FileEngine):
        return compile_denoiser(engine, denoiser, args, kwargs, options)
    with TemporaryDirectory(prefix="edadm-engine-") as folder:
        with long_step(lambda: f"converting the denoiser for the engine '{engine.name}'"):
            engine.save(denoiser, args, kwargs, options, Path(folder))
        require_first_call(engine, Path(folder), args, kwargs, options)
        compiled = load_denoiser(engine, Path(folder), options)
        compiled.keep_source(denoiser)
        return compiled


def require_first_call(
    engine: FileEngine, folder: Path, args: tuple[Any, ...], kwargs: dict[str, Any], options: EngineOptions
) -> None:
    """Loads new files of an engine and calls the denoiser once, in a separate process.

    A library that compiles graphs can crash on an unknown graph. Such a crash becomes an error here.

    Raises:
        MachineError: The process crashed or was killed.
        EdadmError: The files cannot be loaded or called.
    """
    lost = partial(
        ProcessLostError,
        f"The first call of the denoiser on the engine '{engine.name}'",
        hint="edadm engines lists the other engines; without --engine, torch computes",
        hint_if_killed="free some memory; without --engine, torch computes",
    )
    with long_step(lambda: f"calling the denoiser on the engine '{engine.name}' for the first time"):
        IsolatedProcess(lost, _first_call, engine, folder, pack((args, kwargs)), options).close()


def _first_call(engine: FileEngine, folder: Path, packed: Any, options: EngineOptions) -> None:
    args, kwargs = unpack(packed)
    with torch.no_grad():
        load_denoiser(engine, folder, options)(*args, **kwargs)


def load_on_engine(
    run: RunFolder, export: Artifact, engine: Engine, device: torch.device, dtype: torch.dtype, reporter: Reporter
) -> LoadedModel:
    """Returns the exported pipeline with each of its denoisers on an engine.

    Args:
        run: The run of the export.
        export: The quantized pipeline.
        engine: The engine. An engine with files loads them, and makes them first if necessary.
        device: The device of the pipeline.
        dtype: The element type of the pipeline, and of what the engine does not quantize.
        reporter: It receives a note if the denoiser is converted.

    Raises:
        MachineError: The engine cannot run here.
    """
    engine.require(device)
    model = load_model(str(export.path), device, dtype, _entry(run))
    options = EngineOptions(device, dtype)
    files = engine_artifact(run, export, engine, reporter).path if isinstance(engine, FileEngine) else None
    for place, each in model.by_denoiser().items():
        if files is not None and isinstance(engine, FileEngine):
            compiled = load_denoiser(engine, files / place, options)
            compiled.keep_source(each.denoiser)
        else:
            compiled = compile_denoiser(engine, each.denoiser, *example(run, device, dtype, place), options)
        put_on_engine(each, compiled)
    return model


def file_engine(engine: Engine) -> FileEngine:
    """Returns the engine itself, with the type of an engine that has files.

    Raises:
        UsageError: The engine has no files.
    """
    if not isinstance(engine, FileEngine):
        raise UsageError(
            f"The engine '{engine.name}' keeps no files; it loads an export as it is.",
            hint=f"edadm sample --engine {engine.name}",
        )
    return engine


def example(
    run: RunFolder, device: torch.device, dtype: torch.dtype, place: str = ""
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the `(args, kwargs)` of one denoiser call like those that the pipeline makes for one image.

    Args:
        run: The run, with a calibration set.
        device: The device of the tensors.
        dtype: The element type of the denoiser.
        place: The folder of the denoiser within an artifact, `""` for the first denoiser of the pipeline.
    """
    return CalibrationSet.load(run.open("select").within(place)).call(range(1), device, dtype)


def _entry(run: RunFolder) -> ModelEntry:
    return CollectedRun.open(run).entry


def _current(run: RunFolder, spec: BuildSpec, reporter: Reporter) -> Artifact | None:
    """Returns the artifact that exists already, if it is intact and was made from this export; `None` otherwise."""
    if not run.has(KIND, spec.name):
        return None
    try:
        artifact = open_artifact(run.path(KIND, spec.name), KIND)
    except InputError as error:
        reporter.warn(f"The engine's files in the run are damaged and made again: {error.message}")
        return None
    return artifact if artifact.identity == spec.identity else None
