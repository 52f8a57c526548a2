"""The interface by which a stage reports its progress, to a terminal, a log, or nobody; and the names of long steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Reporter(Protocol):
    """Receives warnings, details and progress of a running stage; results are returned and not reported."""

    warnings: list[str]

    def warn(self, message: str) -> None:
        """Warns the user of something about the result; the message also enters the record's `warnings`."""

    def note(self, message: str) -> None:
        """Reports a detail, which is shown with `--verbose` only."""

    def task(self, description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Opens a progress bar of `total` steps, and yields the progress callback, which takes the steps just done."""


_long_steps: list[Callable[[], str]] = []


@contextmanager
def long_step(describe: Callable[[], str]) -> Iterator[None]:
    """Names a step that may take minutes and cannot count how far it is, such as a download, while entered.

    Args:
        describe: Returns the words for it, such as "downloading owner/name". It is called from another thread.
    """
    _long_steps.append(describe)
    try:
        yield
    finally:
        _long_steps.remove(describe)


def current_long_step() -> str | None:
    """Returns the words for the innermost long step that is running; `None` if there is none."""
    innermost = _long_steps[-1:]  # one operation, because the step may end meanwhile
    return innermost[0]() if innermost else None


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
        yield lambda _: None
