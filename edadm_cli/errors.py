"""The failures a user can meet: each is one sentence, a hint with the next command, and an exit code."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_INTERNAL = 1
EXIT_USAGE = 2
EXIT_INPUT = 3
EXIT_MACHINE = 4
EXIT_REQUIREMENT = 5
EXIT_INTERRUPTED = 130


class EdadmError(Exception):
    """An expected failure.

    Args:
        message: One sentence: what was wanted and what was found.
        hint: The next command to type, or what to change; `None` where nothing helps.
    """

    exit_code: int = EXIT_INTERNAL

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(EdadmError):
    """The command line or a configuration file asks for something that does not exist or cannot be."""

    exit_code = EXIT_USAGE


class InputError(EdadmError):
    """A model, an artifact or a file is missing, broken, in use, or does not fit."""

    exit_code = EXIT_INPUT


class MachineError(EdadmError):
    """This machine cannot do it: no such device, no space, an engine that is not installed."""

    exit_code = EXIT_MACHINE


class RequirementError(EdadmError):
    """A `--require` was not met."""

    exit_code = EXIT_REQUIREMENT
