"""Reports on stderr while a stage runs: progress on a terminal and in logs, warnings always, details on request."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from edadm_cli.cli.text import one_line

if TYPE_CHECKING:
    from rich.progress import Progress

_LINE_SECONDS = 30.0
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


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


def share_gpu_memory() -> None:
    """Lets a GPU's memory that tensors of one size gave back serve tensors of another; called before torch starts."""
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def keep_freed_memory() -> None:
    """Lets the process reuse the memory of freed tensors instead of returning each to the system.

    glibc gives a large block back as soon as it is freed, and the system has to clear every page of the next one. With
    this call, blocks of up to 64 MiB (32 MiB before glibc 2.35, which takes no larger number) come from memory that the
    process has, of which it keeps up to 256 MiB. Settings of the user's environment take precedence, and other C
    libraries are left as they are.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    import ctypes

    with suppress(OSError, TypeError, AttributeError):  # Windows, macOS and musl have no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        # the second number alone would fix the first one at its initial 128 KiB
        if mallopt(_M_MMAP_THRESHOLD, 64 << 20) or mallopt(_M_MMAP_THRESHOLD, 32 << 20):
            mallopt(_M_TRIM_THRESHOLD, 256 << 20)


def calm_libraries(verbose: bool) -> None:
    """Silences libraries on stderr; it has to be called before they are imported."""
    if verbose:
        return
    warnings.simplefilter("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # applies to the processes that a stage starts
    # matplotlib warns of a home folder that cannot be written, and torch of how torchao registers its types
    for name in ("matplotlib", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
