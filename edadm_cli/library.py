"""The two functions that most programs need: `quantize` builds an export, `load` returns a pipeline that runs it.

Both are attributes of `edadm_cli`. The stages can be called one by one too: each stage package exports a `STAGE` with
`run(config, run_folder)`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from pydantic import ValidationError

from edadm_cli import collect, export, reconstruct, select
from edadm_cli.artifacts import (
    CollectRecord,
    ExportRecord,
    ReconstructRecord,
    RunFolder,
    SelectRecord,
    explain_validation,
)
from edadm_cli.artifacts.inspection import run_of_artifact
from edadm_cli.config import BitWidth, CollectConfig, DTypeName, ExportConfig, ReconstructConfig, SelectConfig
from edadm_cli.errors import EdadmError, InputError, UsageError
from edadm_cli.progress import Reporter, SilentReporter
from edadm_cli.recipe import load_recipe

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from edadm_cli.engines.base import Engine
    from edadm_cli.models.loaded import LoadedModel

TORCH = "torch"
"""The name in `load` for the export as diffusers loads it, without an engine."""


@dataclass(frozen=True)
class Quantized:
    """The result of `quantize`: the record of each stage, with the keys of the command's JSON object.

    Attributes:
        run: The run folder.
        folder: The diffusers folder with the quantized pipeline.
        collect: Record of the full-precision sampling.
        select: Record of the calibration set.
        reconstruct: Record of the quantization parameters.
        export: Record of the export, with its sizes and its parity.
    """

    run: Path
    folder: Path
    collect: CollectRecord
    select: SelectRecord
    reconstruct: ReconstructRecord
    export: ExportRecord


def quantize(
    model: str | Path,
    *,
    bits: str,
    run: str | Path,
    recipe: str | Path = "default",
    device: str = "auto",
    seed: int = 0,
    force: bool = False,
    text_encoders: Literal["float", "int8"] = "float",
    reporter: Reporter | None = None,
    **sampling: Any,
) -> Quantized:
    """Quantizes a model: collects, selects, reconstructs and exports, and skips what is up to date.

    Args:
        model: A known name, a diffusers folder, a hub id or a checkpoint file.
        bits: Bits of weights and activations, such as `w4a8`.
        run: The run folder, which is created if it is missing.
        recipe: Name or TOML file of a recipe.
        device: `cpu`, `cuda`, `cuda:N`, or `auto`.
        seed: Seed of everything random.
        force: Whether artifacts are built again, and those with other settings replaced.
        text_encoders: `int8` for text encoders with weights of 8 bits; this needs the package torchao.
        reporter: Receives progress and warnings; by default they are only kept in the records.
        sampling: Further fields of `CollectConfig`, such as `num_trajectories` and `num_steps`.

    Raises:
        EdadmError: Any expected failure, with one sentence, a hint and an exit code. Its subclasses are `UsageError`,
            `InputError` and `MachineError`.
    """
    from edadm_cli.select.strategies import strategy_named

    width, chosen, run_folder = BitWidth.parse(bits), load_recipe(str(recipe)), RunFolder(Path(run))
    common: dict[str, Any] = {"device": device, "seed": seed}
    options: dict[str, Any] = {"force": force, "reporter": reporter or SilentReporter()}
    sampling = {**chosen.collect.model_dump(exclude_none=True), **sampling}
    try:
        collecting = CollectConfig(model=str(model), **common, **sampling)
        selecting = SelectConfig(**common, **chosen.select.model_dump(exclude_none=True))
        reconstructing = ReconstructConfig(bits=width, recipe=chosen, **common)
        exporting = ExportConfig(bits=width, text_encoders=text_encoders, **common)
    except ValidationError as error:
        raise UsageError(f"quantize was called with a wrong argument: {explain_validation(error)}.") from error
    strategy_named(selecting.strategy)
    return Quantized(
        run=run_folder.root,
        folder=export.STAGE.path(exporting, run_folder),
        collect=cast(CollectRecord, collect.STAGE.run(collecting, run_folder, **options)),
        select=cast(SelectRecord, select.STAGE.run(selecting, run_folder, **options)),
        reconstruct=cast(ReconstructRecord, reconstruct.STAGE.run(reconstructing, run_folder, **options)),
        export=cast(ExportRecord, export.STAGE.run(exporting, run_folder, **options)),
    )


def load(
    folder: str | Path,
    *,
    engine: str = "auto",
    device: str = "auto",
    dtype: str = "float32",
    lora: Mapping[str | Path, float] | None = None,
    reporter: Reporter | None = None,
) -> DiffusionPipeline:
    """Loads an exported pipeline that generates with an engine, by default with the fastest one of this machine.

    Args:
        folder: The export, in its run folder or moved elsewhere.
        engine: A name from `edadm engines`; `torch` for the export as diffusers loads it; `auto` for the engine of the
            device if it can run the export, else `torch`.
        device: `cpu`, `cuda`, `cuda:N`, or `auto`.
        dtype: Element type of what is not quantized.
        lora: LoRA files, each with its weight. They run beside the quantized layers under the names of the files,
            `style` for `style.safetensors` and `style_v2` for `style.v2.safetensors`; `pipeline.set_adapters` weights
            them at any time.
        reporter: Receives the warning that says why `auto` chose `torch`.

    Returns:
        The diffusers pipeline. Its attribute `edadm_engine` is the name of the engine that runs the denoiser.

    Raises:
        InputError: There is no export in the folder, or it is broken.
        MachineError: There is no such device, or the engine that is named cannot run here.
        UsageError: There is no such engine or element type.
    """
    import torch

    from edadm_cli.engines.registry import default_engine
    from edadm_cli.engines.registry import engine as engine_of
    from edadm_cli.integrations.lora import load_loras
    from edadm_cli.models.loading import load_model, resolve_device

    if dtype not in get_args(DTypeName):
        raise UsageError(
            f"There is no element type '{dtype}' for a pipeline; dtype is {', '.join(get_args(DTypeName))}."
        )
    path, place, reporter = Path(folder), resolve_device(device), reporter or SilentReporter()
    if not (path / "model_index.json").is_file():
        raise InputError(f"{path} holds no exported pipeline.", hint="edadm export")
    element: torch.dtype = getattr(torch, dtype)
    chosen = None if engine == TORCH else default_engine(place) if engine == "auto" else engine_of(engine)
    model = None
    if chosen is not None:
        try:
            model = _on_engine(path, chosen, place, element, lora or {}, reporter)
        except EdadmError as error:
            if engine != "auto":
                raise
            reporter.warn(f"The engine '{chosen.name}' cannot run {path}, and torch runs it: {error.message}")
    if model is None:
        model, chosen = load_model(str(path), place, element), None
        load_loras(model, lora or {})
    pipeline = model.pipeline
    pipeline.edadm_engine = TORCH if chosen is None else chosen.name
    return cast("DiffusionPipeline", pipeline)


def _on_engine(
    path: Path,
    engine: Engine,
    device: torch.device,
    dtype: torch.dtype,
    lora: Mapping[str | Path, float],
    reporter: Reporter,
) -> LoadedModel:
    """Returns the export on an engine: from the engine's files in its run, elsewhere compiled for a usual call.

    It is compiled too where the run has no such files and may not be written, as one of another user.
    """
    from edadm_cli.engines.base import EngineOptions
    from edadm_cli.engines.files import compile_new, load_on_engine
    from edadm_cli.engines.pipeline import put_on_engine
    from edadm_cli.integrations.lora import load_loras
    from edadm_cli.models.example_calls import example_call
    from edadm_cli.models.loading import load_model

    run_folder, kind, name = run_of_artifact(path)
    if lora and not engine.takes_adapters:
        raise UsageError(
            f"The engine '{engine.name}' runs no LoRA beside quantized layers; 'torch' and 'cuda' do.",
            hint="edadm_cli.load(FOLDER, engine='torch', lora=...), or fuse the file: edadm export --lora FILE --force",
        )
    in_run = run_folder if kind == "export" and run_folder is not None and run_folder.has("select") else None
    if not lora and in_run is not None and _has_or_takes_files(in_run, str(name), engine):
        return load_on_engine(in_run, in_run.open("export", name), engine, device, dtype, reporter)
    engine.require(device)
    model = load_model(str(path), device, dtype)
    load_loras(model, lora)
    for each in model.by_denoiser().values():
        args, kwargs = example_call(each.denoiser, batch_size=1)
        put_on_engine(each, compile_new(engine, each.denoiser, args, kwargs, EngineOptions(device, dtype)))
    return model


def _has_or_takes_files(run: RunFolder, bits: str, engine: Engine) -> bool:
    """Returns whether a run holds the engine's files of an export, or may be written so that they can be made."""
    from edadm_cli.engines.base import FileEngine
    from edadm_cli.engines.files import KIND

    return not isinstance(engine, FileEngine) or run.has(KIND, f"{bits}-{engine.name}") or os.access(run.root, os.W_OK)
