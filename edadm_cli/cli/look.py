"""The commands that only look: inspect and models."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edadm_cli.cli.boundary import failure_fields, tell_error
from edadm_cli.cli.execution import Execution, output_command, place_command
from edadm_cli.errors import InputError

if TYPE_CHECKING:
    from edadm_cli.models.registry import ModelEntry


@place_command
def inspect(
    execution: Execution,
    path: Annotated[
        Path | None, typer.Argument(metavar="[PATH]", help="An artifact or a run folder; else the run.")
    ] = None,
) -> None:
    """Show and check an artifact or a run.

    What it holds, what it descends from, and whether every file is as it was written.
    """
    from edadm_cli.artifacts import RunFolder
    from edadm_cli.artifacts.inspection import inspect_artifact, inspect_run, is_artifact, run_of_artifact

    started = time.monotonic()
    folder = path if path is not None else execution.run_used_last().root
    single = is_artifact(folder)
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
    tell_error(error)
    raise typer.Exit(error.exit_code)


@output_command
def models(execution: Execution) -> None:
    """List the known models.

    And whether each lies on this machine: built here, in the package, or in the hub's cache.
    """
    from edadm_cli.models.registry import known_models

    rows = [{**entry.model_dump(mode="json"), "available": _is_available(entry)} for entry in known_models().values()]
    execution.print_facts({"models": rows}, "\n".join(row["name"] for row in rows))


def _is_available(entry: ModelEntry) -> bool:
    """Whether a model lies on this machine: built here, in the package, or in the hub's cache."""
    if entry.source == "random":
        return True
    if entry.source == "compvis":
        return Path(entry.location).is_file()
    if entry.source == "hub":
        from huggingface_hub import try_to_load_from_cache

        return isinstance(try_to_load_from_cache(entry.location, "model_index.json"), str)
    from edadm_cli.models.digits.data import model_folder

    try:
        return model_folder(entry.location).is_dir()
    except InputError:
        return False
