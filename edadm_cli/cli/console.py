"""Reports on stderr while a stage runs: progress on a terminal and in logs, warnings always, details on request."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edadm_cli.cli.text import one_line
from edadm_cli.progress import current_long_step

if TYPE_CHECKING:
    from rich.progress import Progress

_LINE_SECONDS = 30.0
_TICK_SECONDS = 5.0  # between two looks whether a line is due, while a bar is shown
_CANNOT_REDRAW = ("dumb", "unknown")  # terminals on which rich shows a bar only when it is done


def can_redraw() -> bool:
    """Returns whether stderr is a terminal that can draw a line anew, as a progress bar needs it."""
    return sys.stderr.isatty() and os.environ.get("TERM", "").lower() not in _CANNOT_REDRAW


class ConsoleReporter:
    """Reports progress, warnings and details on stderr, to a terminal or to a log.

    Args:
        bars: Whether progress bars are shown.
        lines: Whether progress is reported as a line of text every half minute, for logs. Where neither bars nor lines
            are shown, `alive` shows nothing either.
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
        self._states: list[Callable[[], str]] = []  # of the open tasks of a log, the innermost last

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
            with self._lines_of(description, total) as advance:
                yield advance
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

    @contextmanager
    def alive(self, command: str) -> Iterator[None]:
        """Writes a line whenever half a minute has passed without one, while entered.

        Loading a large model, a download or a compiler can take minutes without any progress to count, and a log or a
        terminal without a bar would look as if the command had died.

        Args:
            command: The name of the command, for steps that have no name of their own.
        """
        if self._silent or not (self._bars or self._lines):
            yield
            return
        ended = threading.Event()
        thread = threading.Thread(target=self._beat, args=(command, ended), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _beat(self, command: str, ended: threading.Event) -> None:
        """Writes the lines of `alive` until the event is set."""
        while not ended.wait(max(_TICK_SECONDS, self._last_line + _LINE_SECONDS - time.monotonic())):
            now = time.monotonic()
            if self._progress is None and now - self._last_line >= _LINE_SECONDS:
                states = [state() for state in self._states[-1:]]  # the task may end meanwhile
                self._progress_line(current_long_step() or (*states, f"{command} is still working")[0], now)

    @contextmanager
    def _lines_of(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Yields a progress callback that writes a line if the last one is half a minute old."""
        done = 0

        def state() -> str:
            return f"{description}: {done} of {total} done"

        def advance(steps: int) -> None:
            nonlocal done
            done, now = done + steps, time.monotonic()
            if self._lines and now - self._last_line >= _LINE_SECONDS:
                self._progress_line(state(), now)

        self._states.append(state)
        try:
            yield advance
        finally:
            self._states.remove(state)

    def _progress_line(self, text: str, now: float) -> None:
        self._last_line = now
        self._line(f"{text}, {now - self._started:.0f} s after the start")

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
