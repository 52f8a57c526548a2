"""SIGINT and SIGTERM end a command with a sentence and an exit code; computed results are kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from edadm_cli.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, EdadmError

_HANDLED: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Signals:
    """Handles signals: the first one raises `KeyboardInterrupt`, a second one ends the process at once."""

    def __init__(self) -> None:
        self.number: int | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal."""
        self.number = number
        for each in _HANDLED:
            signal.signal(each, signal.SIG_DFL)
        raise KeyboardInterrupt

    def explain(self) -> EdadmError:
        """Returns the failure that reports the interruption."""
        is_termination = self.number == signal.SIGTERM
        message = "Terminated by SIGTERM." if is_termination else "Interrupted."
        error = EdadmError(message, hint="the same command resumes where it was")
        error.exit_code = EXIT_TERMINATED if is_termination else EXIT_INTERRUPTED
        return error


@contextmanager
def handled_signals(is_program: bool) -> Iterator[Signals]:
    """Handles signals while entered; a signal that the process was started to ignore stays ignored.

    Args:
        is_program: Whether the process ends afterwards. Signals are ignored from then on, because an interpreter that
            is interrupted while it exits would end with the signal's exit code although the work is done.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    handled = [number for number, usual in _HANDLED.items() if signal.getsignal(number) == usual]
    for number in handled:
        signal.signal(number, signals.handle)
    try:
        yield signals
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_IGN if is_program else _HANDLED[number])
