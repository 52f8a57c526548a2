"""Writes further files of an export, for an engine or for another program; they are an artifact of their own."""

from __future__ import annotations

from edadm_cli.artifacts import (
    Artifact,
    EngineFiles,
    RunFolder,
)
from edadm_cli.config import ExportConfig
from edadm_cli.engines.files import FileWriter, engine_artifact, file_engine
from edadm_cli.engines.registry import engine as engine_of
from edadm_cli.errors import UsageError
from edadm_cli.integrations.comfyui.writing import ComfyUiFile
from edadm_cli.progress import Reporter


def writer_of(config: ExportConfig) -> FileWriter | None:
    """Returns the writer of further files of the export, which have an artifact of their own.

    Raises:
        UsageError: Both an engine and a format are named, or the engine has no files.
    """
    if config.format == "comfyui":
        if config.engine is not None:
            raise UsageError("--engine and --format comfyui each write files of their own: ask for one at a time.")
        return ComfyUiFile()
    return None if config.engine is None else file_engine(engine_of(config.engine))


def write_files(run: RunFolder, export: Artifact, writer: FileWriter, reporter: Reporter, force: bool) -> EngineFiles:
    """Returns the further files as an artifact, which is written unless it is up to date."""
    artifact = engine_artifact(run, export, writer, reporter, force)
    size = sum(entry.bytes for entry in artifact.manifest.payload) / 2**20
    return EngineFiles(name=writer.name, artifact=str(artifact.path), identity=artifact.identity, size_mib=size)
