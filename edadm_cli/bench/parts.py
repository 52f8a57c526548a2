"""Measures how many seconds each part of a bench takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from edadm_cli.progress import Reporter


class Parts:
    """Adds up the seconds of the parts of a bench, which are reported as details when they end.

    Args:
        reporter: Receives one line per part.

    Attributes:
        seconds: The seconds of each part, by name, in the order in which the parts first ended.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Measures the seconds of a `with` block, and adds them to those of its part."""
        started = time.monotonic()
        try:
            yield
        finally:
            took = time.monotonic() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + took
            self._reporter.note(f"{name}: {took:.1f} s")
