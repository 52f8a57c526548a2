"""Measures the peak memory of a stage in MiB.

The system records the high-water mark of the resident set (`VmHWM`), and torch that of its allocations on a GPU. Both
are reset when a stage begins, so that each of several stages in one process has its own peak.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_FORGET_PEAK = "5"
_KIB, _MIB = 2**10, 2**20
_reached: dict[int, int] = {}  # peak bytes on each GPU before a part of the stage began its own peak


def reset_peak() -> None:
    """Resets the peak of the resident set, if the system allows it, and that of every GPU."""
    reset_resident_peak()
    _reached.clear()
    for index in _gpus():
        sys.modules["torch"].cuda.reset_peak_memory_stats(index)


def peak_memory() -> dict[str, float | None]:
    """Returns the peaks since `reset_peak`.

    Returns:
        `peak_memory_mib` of the resident set; `peak_cuda_memory_mib` of the GPU that took most, `None` where none
        computed.
    """
    bytes_of = [max(_reached.get(index, 0), sys.modules["torch"].cuda.max_memory_allocated(index)) for index in _gpus()]
    cuda = round(max(bytes_of) / _MIB, 1) if bytes_of else None
    return {"peak_memory_mib": resident_peak_mib(), "peak_cuda_memory_mib": cuda}


def reset_resident_peak() -> None:
    """Resets the peak of the resident set to its present size, if the system allows it."""
    try:
        _CLEAR.write_text(_FORGET_PEAK)
    except OSError:
        return


def resident_peak_mib() -> float:
    """Returns the resident set's high-water mark, MiB."""
    try:
        lines = _STATUS.read_text().splitlines()
        peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * _KIB
    except (OSError, StopIteration):
        mark = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = mark if sys.platform == "darwin" else mark * _KIB
    return round(peak / _MIB, 1)


def reset_cuda_peak(device: torch.device) -> None:
    """Resets the peak on one GPU for a part of a stage; the stage's own peak still includes the time before."""
    import torch

    index = device.index or 0
    _reached[index] = max(_reached.get(index, 0), torch.cuda.max_memory_allocated(device))
    torch.cuda.reset_peak_memory_stats(device)


def _gpus() -> range:
    """Returns the numbers of the GPUs of a process that has used one; torch is not imported to find out."""
    torch = sys.modules.get("torch")
    return range(torch.cuda.device_count() if torch is not None and torch.cuda.is_initialized() else 0)
