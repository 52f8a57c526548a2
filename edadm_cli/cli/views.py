"""The commands that show things without changing a run: report, inspect, models and engines."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edadm_cli.artifacts import ReportRecord, RunFolder, spent
from edadm_cli.artifacts.artifact import has_manifest
from edadm_cli.artifacts.inspection import inspect_artifact, inspect_run, run_of_artifact
from edadm_cli.cli import flags
from edadm_cli.cli.boundary import failure_fields, report_error
from edadm_cli.cli.execution import Execution, output_command, run_command
from edadm_cli.errors import InputError

if TYPE_CHECKING:
    from edadm_cli.models.registry import ModelEntry


_PATH = flags.Parameter(
    "path",
    flags.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None, typer.Argument(metavar="PATH", help="An artifact or a run folder; by default the run.")
    ],
)


@run_command(flags.several_bits("Bit widths to show, repeatable or with commas; by default all."))
def report(execution: Execution, given: dict[str, Any]) -> None:
    """Writes report.html."""
    from edadm_cli.report import stage  # imports the modules that draw the plots

    started = time.monotonic()
    names = [str(width) for width in flags.widths_of(given["bits"])] or None
    run_folder = execution.run_used_last()
    with contextlib.redirect_stdout(sys.stderr):
        page = stage.run(run_folder, names)
    record = ReportRecord(status="done", run=str(run_folder.root), report=str(page), **spent(started))
    execution.conclude(record, path=str(page))


@run_command(_PATH)
def inspect(execution: Execution, given: dict[str, Any]) -> None:
    """Shows and checks an artifact or a run."""
    started = time.monotonic()
    folder = given["path"] if given["path"] is not None else execution.run_used_last().root
    single = has_manifest(folder)
    artifacts = inspect_artifact(folder) if single else inspect_run(RunFolder(folder))
    run = run_of_artifact(folder)[0] if single else RunFolder(folder)
    result: dict[str, Any] = {
        "command": "inspect",
        "status": "done",
        "run": None if run is None else str(run.root),
        "artifact": str(folder) if single else None,
        "identity": artifacts[0].identity if single else None,
        "seconds": time.monotonic() - started,
        "warnings": [],
        "artifacts": [artifact.model_dump(mode="json") for artifact in artifacts],
    }
    broken = next((artifact for artifact in artifacts if artifact.problem), None)
    if broken is None:
        execution.print(result, [], str(folder))
        return
    error = InputError(str(broken.problem), hint=broken.hint)
    execution.print({**result, **failure_fields(error)}, [], str(folder))
    report_error(error)
    raise typer.Exit(error.exit_code)


@output_command()
def models(execution: Execution, given: dict[str, Any]) -> None:
    """Lists the known models."""
    from edadm_cli.models.registry import known_models

    rows = [{**entry.model_dump(mode="json"), "available": _is_available(entry)} for entry in known_models().values()]
    execution.print_facts({"models": rows}, "\n".join(row["name"] for row in rows))


@output_command()
def engines(execution: Execution, given: dict[str, Any]) -> None:
    """Lists the engines, with their abilities on this machine."""
    from edadm_cli.engines.registry import engine_facts, unusable_engines

    for sentence in unusable_engines():
        execution.reporter.warn(sentence)
    facts = [entry.model_dump(mode="json") for entry in engine_facts()]
    execution.print_facts({"engines": facts}, "\n".join(row["name"] for row in facts))


def _is_available(entry: ModelEntry) -> bool:
    """Returns whether a model is available offline: built here, in the package, or in the hub's cache."""
    if entry.source == "random":
        return True
    if entry.source in ("compvis", "assembled"):
        return Path(entry.location).exists()
    if entry.source == "hub":
        from huggingface_hub import try_to_load_from_cache

        return isinstance(try_to_load_from_cache(entry.location, "model_index.json"), str)
    from edadm_cli.models.shipped import shipped_folder

    try:
        return shipped_folder(entry.location).is_dir()
    except InputError:
        return False
