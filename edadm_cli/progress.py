"""How a stage tells what it is doing, without knowing whether a terminal, a log or nobody listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Reporter(Protocol):
    """What a stage may say while it runs; results are returned, never reported."""

    warnings: list[str]

    def warn(self, message: str) -> None:
        """Tell the user what he should know about the result; it also enters the record's `warnings`."""

    def note(self, message: str) -> None:
        """Tell a curious user one detail; shown with `--verbose` only."""

    def task(self, description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Open a progress bar of `total` steps; the value is called with the number of steps just done."""


class SilentReporter:
    """Keeps warnings and shows nothing: for library use and tests."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        """Keep the message."""
        self.warnings.append(message)

    def note(self, message: str) -> None:
        """Drop the message."""

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Count nothing."""

        def advance(steps: int) -> None:
            return None

        yield advance
