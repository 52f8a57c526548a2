"""`edadm export`: writes a quantized pipeline as a diffusers folder, loads it again and compares the two."""

from __future__ import annotations

import time

from edadm_cli.artifacts import Artifact, BuildSpec, ExportFacts, ExportRecord, RunFolder, shared_keys
from edadm_cli.artifacts.quantization import load_plan
from edadm_cli.config import ExportConfig
from edadm_cli.progress import Reporter, SilentReporter
from edadm_cli.quant.plan import format_version


def run(
    config: ExportConfig, run_folder: RunFolder, *, force: bool = False, reporter: Reporter | None = None
) -> ExportRecord:
    """Packs the denoiser, writes the pipeline, loads it with diffusers, and compares its images.

    Raises:
        InputError: There is no reconstruction, or the model is not the one that it was made from.
        EdadmError: The export computes other images than the reconstruction.
    """
    started, reporter = time.monotonic(), reporter or SilentReporter()
    writer = None
    if _has_files(config):
        from edadm_cli.export.further_files import write_files, writer_of  # imports torch

        writer = writer_of(config)
    if config.text_encoders == "int8":
        from edadm_cli.export.text_encoders import require_package

        require_package()
    spec = build_spec(config, run_folder)
    with run_folder.build(spec, force) as build:
        is_done = build.up_to_date
        artifact = build.artifact
        if artifact is None:
            from edadm_cli.export.building import build_export  # imports torch

            artifact = build_export(config, run_folder, spec.parents[0], build, reporter)
    files = None if writer is None else write_files(run_folder, artifact, writer, reporter, force)
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
        from edadm_cli.export.fusing import LoraFile

        fields["lora"] = [LoraFile.parse(text).identity() for text in config.lora]
    return BuildSpec("export", str(config.bits), fields, config.seed, (source,), source.manifest.model)


def finished(config: ExportConfig, run_folder: RunFolder) -> Artifact | None:
    """Returns the export that `run` would reuse; `None` if further files are requested.

    Raises:
        InputError: An export with other settings has the same place, or there is no reconstruction.
    """
    is_empty = not run_folder.names("export")
    return None if _has_files(config) or is_empty else run_folder.finished(build_spec(config, run_folder))


def artifact_name(config: ExportConfig) -> str:
    """Returns the artifact's name within its kind."""
    return config.name


def _has_files(config: ExportConfig) -> bool:
    """Returns whether further files are requested, which are an artifact of their own."""
    return config.engine is not None or config.format != "diffusers"
