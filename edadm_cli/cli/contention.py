"""Measures how much other work kept this process from the processors, which makes an estimate unreliable."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

_TASKS = Path("/proc/self/task")


@dataclass(frozen=True)
class Scheduling:
    """The nanoseconds that the threads of this process have run and have waited for a processor, up to now."""

    ran: int = field(default_factory=lambda: _sum(0))
    waited: int = field(default_factory=lambda: _sum(1))

    def share_lost(self) -> float:
        """Returns the share of processor time that other processes took since then; 0 if it is not recorded."""
        now = Scheduling()
        ran, waited = now.ran - self.ran, now.waited - self.waited
        return max(0.0, waited / (ran + waited)) if ran + waited > 0 else 0.0


def _sum(column: int) -> int:
    """Returns one column of `schedstat` (nanoseconds on a processor, in the queue for one, slices) over all threads."""
    total = 0
    for path in _TASKS.glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[column])
        except (OSError, IndexError, ValueError):
            continue  # the thread has ended, or the kernel does not record it
    return total
