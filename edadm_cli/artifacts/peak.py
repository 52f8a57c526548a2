"""The most memory that this process has held: what a stage's manifest says of its appetite."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_FORGET_PEAK = "5"
_KIB, _MIB = 2**10, 2**20


def reset_peak() -> None:
    """Start measuring anew, where the system can: of several stages in one process each has its own peak."""
    try:
        _CLEAR.write_text(_FORGET_PEAK)
    except OSError:
        return
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, float]:
    """`peak_memory_mib`, the resident set's high-water mark, and `peak_cuda_memory_mib` where a GPU computed."""
    found = {"peak_memory_mib": round(_resident_bytes() / _MIB, 1)}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        found["peak_cuda_memory_mib"] = round(torch.cuda.max_memory_allocated() / _MIB, 1)
    return found


def _resident_bytes() -> int:
    try:
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * _KIB
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * _KIB
