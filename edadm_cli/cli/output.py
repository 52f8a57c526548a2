"""Writes results to stdout: tables for people, one JSON object, or one path."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from enum import Enum
from typing import Any

from edadm_cli.errors import UsageError

_WIDTH_OF_LOGS = 120
_NARROWEST = 72  # columns of a narrower list would hold nothing
_NARROWEST_FACTS = 40  # of names and values, which are folded


class Output(Enum):
    """The form in which a result is printed."""

    TABLE = "table"
    JSON = "json"
    PATH = "path"

    @classmethod
    def of(cls, json_output: bool, quiet: bool) -> Output:
        """Returns the form that the flags ask for.

        Raises:
            UsageError: The flags ask for two forms.
        """
        if json_output and quiet:
            raise UsageError("--json and --quiet exclude each other: stdout has either the JSON object or the path.")
        return cls.JSON if json_output else cls.PATH if quiet else cls.TABLE


def show(output: Output, result: Mapping[str, Any], path: str | None) -> None:
    """Prints a result.

    Args:
        output: The form.
        result: The JSON object.
        path: The path that `--quiet` prints; `None` prints nothing.
    """
    if output is Output.JSON:
        write_line(json.dumps(result))
    elif output is Output.PATH:
        if path is not None:
            write_line(path)
    else:
        from rich.console import Console
        from rich.table import Table

        from edadm_cli.cli.tables import fold_names, is_list, render

        width = _width()
        console = Console(width=max(_NARROWEST, width), emoji=False, highlight=False)
        with console.capture() as capture:
            for part in render(result):
                room = max(_NARROWEST if is_list(part) else _NARROWEST_FACTS, width)
                if isinstance(part, Table) and not is_list(part):
                    fold_names(part, room)
                console.print(part, width=room)
        write_line(capture.get().rstrip("\n"))


def write_line(text: str) -> None:
    """Writes a line to stdout."""
    print(text, flush=True)


def _width() -> int:
    """Returns the width of the terminal.

    It is fixed if stdout is not a terminal, so that tables in logs do not depend on the environment.
    """
    if not sys.stdout.isatty() and "COLUMNS" not in os.environ:
        return _WIDTH_OF_LOGS
    return shutil.get_terminal_size().columns
