"""The error boundary: reports any failure as one sentence with a hint, and turns it into an exit code."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import typer

from edadm_cli.cli.output import write_line
from edadm_cli.cli.signals import Signals
from edadm_cli.cli.text import one_line
from edadm_cli.errors import (
    EXIT_DONE,
    EXIT_INTERNAL,
    EXIT_INTERRUPTED,
    EdadmError,
    InputError,
    MachineError,
    UsageError,
    explain_field,
    missing_package,
)
from edadm_cli.launching import launched_index
from edadm_cli.plugins import plugin_failure
from edadm_cli.processes import LostProcessError

if TYPE_CHECKING:
    from pydantic import ValidationError


_NO_MEMORY = ("can't allocate memory", "bad_alloc", "Cannot allocate memory", "bad allocation")
_EXTRA = "Got unexpected extra argument(s) ("
_LOOP = "Symlink loop from"
_NO_MAPPING = ("failed to map segment", "cannot map", "cannot allocate memory", "cannot enable executable stack")


def guard(arguments: Sequence[str], work: Callable[[], Any], signals: Signals) -> int:
    """Runs a command line and returns its exit code; a failure is reported on stderr, and on stdout with `--json`.

    Args:
        arguments: The command line, which is searched for `--json` and `--verbose` even if it does not parse.
        work: Parses and runs the command line; it returns an exit code or `None`.
        signals: The signals that the process received.
    """
    try:
        code = work()
        if signals.number is None and code != EXIT_INTERRUPTED:
            sys.stdout.flush()
            return code if isinstance(code, int) else EXIT_DONE
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else EXIT_INTERNAL
    except KeyboardInterrupt:
        pass
    except Exception as error:  # noqa: BLE001 - this is the place where every failure ends
        if signals.number is None:
            if "--verbose" in arguments or "-v" in arguments:
                traceback.print_exc(file=sys.stderr)
            return _report(arguments, explain(error, arguments))
    return _report(arguments, signals.explain())


def explain(error: Exception, arguments: Sequence[str] = ()) -> EdadmError:
    """Turns any exception into the failure that is reported to the user."""
    if isinstance(error, EdadmError):
        return error
    if isinstance(error, typer.TyperException):
        message = error.format_message()
        command = [] if message.startswith("No such command") else _command(arguments)
        if message.startswith(_EXTRA):
            message = f"edadm {' '.join(command)} does not take the argument '{message[len(_EXTRA) : -1]}'."
        return UsageError(message, hint=" ".join(["edadm", *command, "--help"]))

    from pydantic import ValidationError

    from edadm_cli.artifacts import explain_os_error

    if isinstance(error, ValidationError) and error.title.endswith(("Config", "BitWidth")):
        return _explain_validation(error, arguments)
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("edadm"):
        return missing_package(error)
    limit = _explain_limit(error)
    if limit is not None:
        return limit
    explained = explain_os_error(error) if isinstance(error, OSError) else _explain_path(error)
    explained = explained or plugin_failure(error)
    if explained is not None:
        return explained
    kind = type(error).__name__
    return EdadmError(f"internal error: {kind}: {error}", hint="add --verbose to see where, and please report it")


def failure_fields(error: EdadmError) -> dict[str, Any]:
    """Returns the keys of a JSON object that describe a failure."""
    return {
        "status": "failed",
        "error": one_line(error.message),
        "hint": error.hint,
        "exit_code": error.exit_code,
    }


def is_reporting_process(error: EdadmError) -> bool:
    """Returns whether this process reports a failure: the main process does, or the next one if that is lost."""
    index = launched_index()
    return index == 0 or (index == 1 and isinstance(error, LostProcessError) and error.index == 0)


def report_error(error: EdadmError) -> None:
    """Writes a failure to stderr: one sentence, and the hint below it."""
    lines = [f"error: {one_line(error.message)}"]
    if error.hint:
        lines.append(f"hint: {one_line(error.hint)}")
    print("\n".join(lines), file=sys.stderr, flush=True)


def _report(arguments: Sequence[str], error: EdadmError) -> int:
    if not is_reporting_process(error):
        return error.exit_code
    report_error(error)
    if "--json" in arguments:
        command = _command(arguments)
        write_line(json.dumps({"command": command[0] if command else None, **failure_fields(error)}))
    return error.exit_code


def _command(arguments: Sequence[str]) -> list[str]:
    return [argument for argument in arguments[:1] if not argument.startswith("-")]


def _explain_validation(error: ValidationError, arguments: Sequence[str]) -> UsageError:
    first, command = error.errors()[0], _command(arguments)
    field = ".".join(part for part in first["loc"] if isinstance(part, str))  # items of a list have no flags
    if first["type"] == "extra_forbidden":
        return UsageError(f"There is no setting '{field}' in {error.title}.")
    flag = f"--{field.replace('_', '-')}" if field else error.title
    if first["type"] == "missing" and command:
        hint = " ".join(["edadm", *command, "--model", "digits-sd"] if field == "model" else ["edadm", *command, "-h"])
        return UsageError(f"{command[0]} needs {flag}.", hint=hint)
    return UsageError(f"{flag}: {explain_field(first)}.")


def _explain_limit(error: Exception) -> MachineError | None:
    """Returns the failure for a lack of memory or threads; `None` for other errors.

    torch's errors are recognized without importing torch: by their class on CUDA, by their text on the CPU. A library
    that cannot be mapped into memory may appear as the error of the module that imports it.
    """
    kind, text = type(error), str(error)
    on_cuda = kind.__name__ == "OutOfMemoryError" and kind.__module__.startswith("torch")
    if isinstance(error, MemoryError) or on_cuda or (isinstance(error, RuntimeError) and _is_any(text, _NO_MEMORY)):
        return MachineError("The memory is used up.", hint="a smaller batch, or another --device")
    if isinstance(error, (ImportError, OSError, RuntimeError)) and _is_any(text, _NO_MAPPING):
        return MachineError(
            f"A library cannot be loaded into the memory that this process may use: {text}.",
            hint="raise the limit of the address space (ulimit -v)",
        )
    if isinstance(error, (ImportError, OSError)) and "cannot open shared object file" in text:
        return MachineError(f"A library cannot be loaded: {text}.")
    if isinstance(error, RuntimeError) and "can't start new thread" in text:
        return MachineError("This process may not start another thread.", hint="raise the limit (ulimit -u)")
    return None


def _explain_path(error: Exception) -> InputError | None:
    """Returns the failure for a path that `pathlib` cannot resolve; `None` for other errors."""
    text = str(error)
    if isinstance(error, RuntimeError) and text.startswith(_LOOP):
        return InputError(f"{text.removeprefix(_LOOP).strip()}: its symbolic links lead in a circle.")
    if isinstance(error, RuntimeError) and text.startswith("Could not determine home directory"):
        return InputError("A path begins with '~', and there is no such home folder.", "the path without '~'")
    return None


def _is_any(text: str, parts: tuple[str, ...]) -> bool:
    return any(part in text for part in parts)
