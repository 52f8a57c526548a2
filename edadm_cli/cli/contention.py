"""Measures how much other work kept this process from the processors, which makes an estimate unreliable."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

_TASKS = Path("/proc/self/task")


@dataclass(frozen=True)
class Scheduling:
    """The nanoseconds that each thread of this process has run and has waited for a processor, up to now."""

    threads: dict[str, tuple[int, int]] = field(default_factory=lambda: _threads())

    def share_lost(self) -> float:
        """Returns the share of processor time that other processes took since then; 0 if it is not recorded.

        Threads that have ended since then do not count.
        """
        ran = waited = 0
        for name, now in _threads().items():
            before = self.threads.get(name, (0, 0))
            ran, waited = ran + now[0] - before[0], waited + now[1] - before[1]
        return max(0.0, waited / (ran + waited)) if ran + waited > 0 else 0.0


def _threads() -> dict[str, tuple[int, int]]:
    """Returns the first two columns of `schedstat` (nanoseconds on a processor, in the queue for one) by thread."""
    threads = {}
    for path in _TASKS.glob("*/schedstat"):
        try:
            ran, waited = path.read_text().split()[:2]
            threads[path.parent.name] = int(ran), int(waited)
        except (OSError, ValueError):
            continue  # the thread has ended, or the kernel does not record it
    return threads
