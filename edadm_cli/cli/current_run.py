"""Finds the run folder that a command works in, and remembers the one that was used last.

The folder is `--run DIR`, else `$EDADM_RUN`, else `runs/<model>` if the command names a model, else the run that was
used last (`runs/.latest`). A run remembers its last bit width in the same way (`<run>/.latest`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from edadm_cli.artifacts import RunFolder, explained_os_errors
from edadm_cli.artifacts.files import read_text
from edadm_cli.config import BitWidth
from edadm_cli.errors import InputError, UsageError, quoted

RUNS = Path("runs")
LATEST = ".latest"
RUN_VARIABLE = "EDADM_RUN"
_LONGEST_MEMORY = 2**16  # bytes of a path or a bit width


def run_of_model(flag: Path | None, model: str) -> RunFolder:
    """Returns the run folder of a command that names a model."""
    return RunFolder(_named(flag) or RUNS / folder_name(model))


def run_used_last(flag: Path | None) -> RunFolder:
    """Returns the run folder of a command that continues a run.

    Raises:
        InputError: No run is named, and none was used before.
    """
    named = _named(flag)
    if named is not None:
        return RunFolder(named)
    text = _read(RUNS / LATEST)
    if not text:
        raise InputError(
            "No run folder is named by --run or $EDADM_RUN, and none was used here before.",
            hint="edadm collect --model digits-sd",
        )
    if not Path(text).is_dir():
        raise InputError(
            f"The run that was used last, {text}, does not exist any more.", hint="name another one with --run"
        )
    return RunFolder(Path(text))


def remember_run(run: RunFolder) -> None:
    """Remembers a run as the one that was used last, unless `$EDADM_RUN` names it."""
    if not os.environ.get(RUN_VARIABLE):
        _write(RUNS / LATEST, str(run.root))


def remember_bits(run: RunFolder, bits: str) -> None:
    """Remembers a bit width as the run's last one."""
    _write(run.root / LATEST, bits)


def bits_used_last(run: RunFolder, kind: str) -> BitWidth:
    """Returns the bit width of a command that continues a run.

    Args:
        run: The run.
        kind: The kind of the artifact that the command reads; if no width is remembered, its only one is taken.

    Raises:
        UsageError: The run has several bit widths, and none was used last.
        InputError: The run has no such artifact, or what it remembers is no bit width.
    """
    memory = run.root / LATEST
    text = _read(memory)
    if text:
        try:
            return BitWidth.parse(text)
        except UsageError as error:
            message = f"{memory} holds {text[:40]!r} and not the bit width that was used last."
            raise InputError(message, hint=quoted("rm", memory)) from error
    names = run.names(kind)
    if len(names) == 1:
        return BitWidth.parse(names[0])
    if names:
        raise UsageError(f"The run {run.root} holds {', '.join(names)}: name one with --bits.")
    raise InputError(
        f"There is no '{kind}' artifact in the run {run.root}.",
        hint=run.command(kind, "w4a8"),
    )


def folder_name(model: str) -> str:
    """Returns the name of a model's run: the known name, the folder's name, or the hub id with `--` for `/`."""
    path = Path(model)
    text = path.resolve().name if path.exists() else model
    name = re.sub(r"[^A-Za-z0-9._-]+", "--", text).strip("-.")
    if not name:
        raise UsageError(f"The model '{model}' gives no name for a run folder.", hint="name one with --run")
    return name


def _named(flag: Path | None) -> Path | None:
    if flag is not None:
        return flag
    variable = os.environ.get(RUN_VARIABLE)
    return Path(variable) if variable else None


def _read(path: Path) -> str:
    if not os.path.lexists(path):
        return ""
    try:
        return read_text(path, _LONGEST_MEMORY).strip().replace("\0", "")
    except InputError as error:
        raise InputError(error.message, hint=quoted("rm", path)) from error


def _write(path: Path, text: str) -> None:
    with explained_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if _read(path) != text:
            path.write_text(text + "\n", encoding="utf-8")
