"""How a stage reports what it is doing, without knowing whether a terminal, a log or nobody listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Reporter(Protocol):
    """Receives what a stage says while it runs; results are returned, never reported."""

    warnings: list[str]

    def warn(self, message: str) -> None:
        """Warns the user of something about the result; the message also enters the record's `warnings`."""

    def note(self, message: str) -> None:
        """Reports a detail, which is shown with `--verbose` only."""

    def task(self, description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Opens a progress bar of `total` steps; its value is the progress callback, called with steps just done."""


class SilentReporter:
    """Records warnings and shows nothing, as a library does."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        """Records the message."""
        self.warnings.append(message)

    def note(self, message: str) -> None:
        """Ignores the message."""

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Shows nothing."""

        def advance(steps: int) -> None:
            return None

        yield advance
