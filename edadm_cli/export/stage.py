"""`edadm export`: writes a quantized pipeline as a diffusers folder, loads it again and compares the two."""

from __future__ import annotations

import time

import torch

from edadm_cli.artifacts import (
    Artifact,
    Build,
    BuildSpec,
    CallTime,
    EngineFiles,
    ExportFacts,
    ExportRecord,
    FusedLora,
    RunFolder,
    shared_keys,
)
from edadm_cli.artifacts.quantization import load_plan
from edadm_cli.config import ExportConfig
from edadm_cli.engines.files import FileWriter, engine_artifact, file_engine
from edadm_cli.engines.registry import engine as engine_of
from edadm_cli.errors import EdadmError, UsageError
from edadm_cli.export.card import CARD_FILE, CardFacts, model_card
from edadm_cli.export.fusing import LoraFile
from edadm_cli.export.round_trip import compare_loaded, write_reconstruction
from edadm_cli.export.text_encoders import require_package
from edadm_cli.export.timing import (
    SMALLEST,
    memory_to_time,
    require_memory_to_time,
    speed_sentences,
    time_calls,
)
from edadm_cli.export.verdict import layers_by_width, verdict
from edadm_cli.integrations.comfyui.writing import ComfyUiFile
from edadm_cli.integrations.quantizer import format_version
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.loading import resolve_device
from edadm_cli.progress import Reporter, SilentReporter
from edadm_cli.quant.plan import joined


def run(
    config: ExportConfig, run_folder: RunFolder, *, force: bool = False, reporter: Reporter | None = None
) -> ExportRecord:
    """Packs the denoiser, writes the pipeline, loads it with diffusers, and compares its images.

    Raises:
        InputError: There is no reconstruction, or the model is not the one that it was made from.
        EdadmError: The export computes other images than the reconstruction.
    """
    started, reporter = time.monotonic(), reporter or SilentReporter()
    writer = _writer(config)
    if config.text_encoders == "int8":
        require_package()
    spec = build_spec(config, run_folder)
    with run_folder.build(spec, force) as build:
        is_done = build.up_to_date
        artifact = build.artifact or _build(config, run_folder, spec.parents[0], build, reporter)
    files = None if writer is None else _files(run_folder, artifact, writer, reporter, force)
    facts = ExportFacts.load(artifact)
    return ExportRecord(
        **shared_keys(run_folder.root, artifact, up_to_date=is_done, started=started, warnings=reporter.warnings),
        bits=str(config.bits),
        size_mib=facts.size_mib,
        parity=facts.parity,
        layers_by_width=facts.layers_by_width,
        verdict=facts.verdict,
        pipeline=facts.pipeline,
        text_encoders=facts.text_encoders,
        call_time=facts.call_time,
        engine=files,
    )


def build_spec(config: ExportConfig, run_folder: RunFolder) -> BuildSpec:
    """Returns the specification of the artifact that `run` would build, without building it."""
    source = run_folder.open("reconstruct", str(config.bits))
    fields = {**config.identity_fields(), "format_version": format_version(load_plan(source))}
    if config.lora:
        fields["lora"] = [LoraFile.parse(text).identity() for text in config.lora]
    return BuildSpec("export", str(config.bits), fields, config.seed, (source,), source.manifest.model)


def _writer(config: ExportConfig) -> FileWriter | None:
    """Returns the writer of further files of the export, which have an artifact of their own.

    Raises:
        UsageError: Both an engine and a format are named, or the engine has no files.
    """
    if config.format == "comfyui":
        if config.engine is not None:
            raise UsageError("--engine and --format comfyui each write files of their own: ask for one at a time.")
        return ComfyUiFile()
    return None if config.engine is None else file_engine(engine_of(config.engine))


def _files(run: RunFolder, export: Artifact, writer: FileWriter, reporter: Reporter, force: bool) -> EngineFiles:
    """Returns the further files as an artifact, which is written unless it is up to date."""
    artifact = engine_artifact(run, export, writer, reporter, force)
    size = sum(entry.bytes for entry in artifact.manifest.payload) / 2**20
    return EngineFiles(name=writer.name, artifact=str(artifact.path), identity=artifact.identity, size_mib=size)


def finished(config: ExportConfig, run_folder: RunFolder) -> Artifact | None:
    """Returns the export that `run` would reuse; `None` if further files are requested.

    Raises:
        InputError: An export with other settings has the same place, or there is no reconstruction.
    """
    is_empty = not run_folder.names("export")
    has_files = config.engine is not None or config.format != "diffusers"
    return None if has_files or is_empty else run_folder.finished(build_spec(config, run_folder))


def artifact_name(config: ExportConfig) -> str:
    """Returns the artifact's name within its kind."""
    return config.name


def _build(config: ExportConfig, run: RunFolder, source: Artifact, build: Build, reporter: Reporter) -> Artifact:
    collected, device = CollectedRun.open(run), resolve_device(config.device)
    with reporter.task("export", 5) as advance:
        before = write_reconstruction(config, run, source, build.path, reporter, advance)
        after = compare_loaded(config, run, source, build.path, before, reporter, advance)
        measured, sentences = _measured(config, run, build, before.num_parameters, before.half_bytes, device)
        advance(1)
    layers = joined({place: load_plan(source.within(place)) for place in collected.places})
    facts = ExportFacts(
        denoiser=after.denoisers[0],
        further_denoisers=after.denoisers[1:],
        size_mib=after.sizes,
        parity=after.parity,
        layers_by_width=layers_by_width(layers),
        verdict=(*verdict(after.images, layers), *sentences),
        lora=tuple(FusedLora(file=file.path.name, **file.identity()) for file in map(LoraFile.parse, config.lora)),
        pipeline=after.pipeline,
        text_encoders=after.encoders,
        call_time=measured,
    )
    facts.save(build.path)
    card = model_card(CardFacts.of_run(run, source, build.path, facts))
    (build.path / CARD_FILE).write_text(card, encoding="utf-8")
    return build.commit(environment={"device": str(device)})


def _measured(
    config: ExportConfig, run: RunFolder, build: Build, num_parameters: int, half_bytes: int, device: torch.device
) -> tuple[CallTime | None, list[str]]:
    """Returns the times of a few calls, and what the verdict says of them."""
    if not config.measure or num_parameters < SMALLEST:
        return None, []
    try:
        require_memory_to_time(memory_to_time(num_parameters, half_bytes), device)
        measured = time_calls(run, build.path, device)
    except EdadmError as error:
        return None, [f"The speed was not measured: {error.message}"]
    return measured, speed_sentences(measured)
