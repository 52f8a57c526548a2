"""Reports on stderr while a stage runs: progress on a terminal and in logs, warnings always, details on request."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edadm_cli.cli.text import one_line

if TYPE_CHECKING:
    from rich.progress import Progress

_LINE_SECONDS = 30.0
_CANNOT_REDRAW = ("dumb", "unknown")  # terminals on which rich shows a bar only when it is done


def can_redraw() -> bool:
    """Returns whether stderr is a terminal that can draw a line anew, as a progress bar needs it."""
    return sys.stderr.isatty() and os.environ.get("TERM", "").lower() not in _CANNOT_REDRAW


class ConsoleReporter:
    """Reports progress, warnings and details on stderr, to a terminal or to a log.

    Args:
        bars: Whether progress bars are shown.
        lines: Whether progress is reported as a line of text every half minute, for logs.
        verbose: Whether notes are shown.
        silent: Whether nothing is shown at all, since only the main one of several processes reports.
    """

    def __init__(self, *, bars: bool, verbose: bool, silent: bool = False, lines: bool = False) -> None:
        self.warnings: list[str] = []
        self._bars = bars
        self._lines = lines
        self._started = self._last_line = time.monotonic()
        self._verbose = verbose
        self._silent = silent
        self._progress: Progress | None = None
        self._open_tasks = 0

    def warn(self, message: str) -> None:
        """Writes a warning and records it."""
        self.warnings.append(message)
        self._line(f"warning: {message}")

    def note(self, message: str) -> None:
        """Writes a detail, with `--verbose` only."""
        if self._verbose:
            self._line(message)

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Shows one progress bar while entered; several tasks at once share one display."""
        if not self._bars:
            yield self._lines_of(description, total) if self._lines else lambda steps: None
            return
        progress = self._progress or self._start()
        self._open_tasks += 1
        task = progress.add_task(one_line(description), total=total)
        try:
            yield lambda steps: progress.advance(task, steps)
        finally:
            self._open_tasks -= 1
            if self._open_tasks:
                progress.remove_task(task)
            else:
                progress.stop()
                self._progress = None

    def _lines_of(self, description: str, total: int) -> Callable[[int], None]:
        """Returns a progress callback that writes a line if the last one is half a minute old."""
        done = 0

        def advance(steps: int) -> None:
            nonlocal done
            done, now = done + steps, time.monotonic()
            if now - self._last_line >= _LINE_SECONDS:
                self._last_line = now
                self._line(f"{description}: {done} of {total} done, {now - self._started:.0f} s after the start")

        return advance

    def _start(self) -> Progress:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._progress.start()
        return self._progress

    def _line(self, message: str) -> None:
        if self._silent:
            return
        if self._progress is not None:
            self._progress.console.print(one_line(message), markup=False, highlight=False, soft_wrap=True)
        else:
            print(one_line(message), file=sys.stderr, flush=True)
