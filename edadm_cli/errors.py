"""The expected failures: each has one sentence, a hint with the next command, and an exit code."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

EXIT_DONE = 0
EXIT_INTERNAL = 1
EXIT_USAGE = 2
EXIT_INPUT = 3
EXIT_MACHINE = 4
EXIT_REQUIREMENT = 5
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
_LONGEST_SHOWN = 120


class EdadmError(Exception):
    """An expected failure.

    Args:
        message: One sentence that says what was expected and what was found.
        hint: The next command to type, or the setting to change; `None` if nothing helps.
    """

    exit_code: int = EXIT_INTERNAL

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if hint:
            self.add_note(f"hint: {hint}")  # which a traceback shows below the message


class UsageError(EdadmError):
    """The command line or a configuration file asks for something that does not exist or is not possible."""

    exit_code = EXIT_USAGE


class InputError(EdadmError):
    """A model, an artifact or a file is missing, broken, in use, or does not fit."""

    exit_code = EXIT_INPUT


class MachineError(EdadmError):
    """This machine cannot do the work: a device, memory, disk space or a package is missing."""

    exit_code = EXIT_MACHINE


class RequirementError(EdadmError):
    """A `--require` was not met."""

    exit_code = EXIT_REQUIREMENT


# Packages whose distribution has another name than the module.
_DISTRIBUTIONS = {
    "open_clip": "open_clip_torch",
    "torch_fidelity": "torch-fidelity",
    "onnx": "'edadm[onnx]'",
    "onnxruntime": "'edadm[onnx]'",
    "onnxscript": "'edadm[onnx]'",
    "PIL": "pillow",
    "yaml": "pyyaml",
}


def missing_package(error: ModuleNotFoundError, what: str = "This") -> MachineError:
    """Returns the failure of a package that is not installed, with the line that installs it.

    Args:
        error: The error of the import.
        what: The subject of the sentence, which needs the package.
    """
    package = (error.name or "").partition(".")[0]
    hint = f"pip install {_DISTRIBUTIONS.get(package, package)}" if package else None
    return MachineError(f"{what} needs the package '{package}', which is not installed here.", hint=hint)


def quoted(*words: object) -> str:
    """Returns a command line that a shell splits into these words: `quoted("edadm", "--run", "my run")`."""
    return shlex.join(str(word) for word in words)


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """Returns the hint for a name that is misspelt: the known name that is most like it; `None` if none is like it."""
    alike = get_close_matches(name, list(known), n=1)
    return f"did you mean '{alike[0]}'?" if alike else None


# pydantic's messages name Python classes; users write tables and lists.
_EXPECTED = {
    "missing": "it is missing",
    "extra_forbidden": "there is no such field",
    "model_type": "a table is expected",
    "dict_type": "a table is expected",
    "tuple_type": "a list is expected",
    "list_type": "a list is expected",
    "model_attributes_type": "a table is expected",
}


def explain_field(problem: ErrorDetails) -> str:
    """Returns the end of a sentence about a field: the problem with its value, and the value.

    Args:
        problem: One of `ValidationError.errors()`.
    """
    kind, message = problem["type"], problem["msg"].removeprefix("Value error, ")
    text = _EXPECTED.get(kind, message[:1].lower() + message[1:])
    shows_value = kind not in ("missing", "extra_forbidden", "value_error")
    return f"{text}; got {_short(problem['input'])}" if shows_value else text


def _short(value: object) -> str:
    """Returns the `repr` of a value, shortened so that it fits into a sentence."""
    try:
        shown = repr(value)
    except ValueError:  # Python does not convert integers of thousands of digits to text
        return f"a value of type {type(value).__name__} that is too long to show"
    return shown if len(shown) <= _LONGEST_SHOWN else f"{shown[:_LONGEST_SHOWN]}..."
