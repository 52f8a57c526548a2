"""Did other work keep this process from its processors? An estimate that was measured meanwhile says little."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

_TASKS = Path("/proc/self/task")


@dataclass(frozen=True)
class Scheduling:
    """Nanoseconds that the threads of this process have run, and waited for a processor, until it was made."""

    ran: int = field(default_factory=lambda: _sum(0))
    waited: int = field(default_factory=lambda: _sum(1))

    def share_lost(self) -> float:
        """Share of the processor time wanted since then that went to others; 0 where the system does not tell."""
        now = Scheduling()
        ran, waited = now.ran - self.ran, now.waited - self.waited
        return max(0.0, waited / (ran + waited)) if ran + waited > 0 else 0.0


def _sum(column: int) -> int:
    """One column of `schedstat` (nanoseconds on a processor, in the queue for one, slices) over all threads."""
    total = 0
    for path in _TASKS.glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[column])
        except (OSError, IndexError, ValueError):
            continue  # the thread has ended, or the kernel was built without
    return total
