"""The command that uploads an export: push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edadm_cli.cli import flags
from edadm_cli.cli.execution import Execution, output_command
from edadm_cli.errors import UsageError


def _argument(name: str, kind: Any, metavar: str, text: str) -> flags.Parameter:
    annotation = Annotated[kind | None, typer.Argument(metavar=metavar, help=text)]
    return flags.Parameter(name, flags.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


@output_command(
    _argument("folder", Path, "FOLDER", "The export, such as runs/digits-sd/export/w4a8."),
    _argument("repository", str, "OWNER/NAME", "The repository on the hub; it is created if there is none."),
    flags.parameter("private", bool, default=False, help="Create the repository as a private one."),
    flags.parameter(
        "dry_run", bool, default=False, help="List what would be sent, without sending or asking anything."
    ),
)
def push(execution: Execution, given: dict[str, Any]) -> None:
    """Sends an export to the Hugging Face hub."""
    if given["folder"] is None or given["repository"] is None:
        raise UsageError("edadm push needs an export and a repository.", hint="edadm push FOLDER OWNER/NAME --dry-run")
    from edadm_cli.export.push import prepare
    from edadm_cli.export.push import push as send

    upload = prepare(given["folder"], given["repository"])
    facts: dict[str, Any] = {"repository": upload.repository, "files": upload.sizes(), "url": None}
    if given["dry_run"]:
        execution.print_facts({**facts, "status": "planned", "card": upload.card(None)}, upload.repository)
        return
    url = send(upload, given["private"])
    execution.print_facts({**facts, "url": url}, url)
