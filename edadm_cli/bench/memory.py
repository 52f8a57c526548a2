"""Measures the peak memory of a contender.

On a CPU each contender has a process of its own, and its memory is the largest resident set of that process, including
Python and its libraries. The peak is reset in between, so that loading and running are measured apart. On CUDA it is
the memory that torch's allocator holds beyond what was allocated before the contender was loaded.
"""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

import torch

from edadm_cli.artifacts.peak import reset_cuda_peak, reset_resident_peak, resident_peak_mib
from edadm_cli.errors import MachineError

_PROCESS_MIB = 600.0
"""Memory of Python, torch and the libraries of a contender."""
_LOADING = 1.3
"""Memory of a contender in multiples of its size on disk: its kernels' layout of the weights, and activations."""


class PeakMemory:
    """Watches the peak of this process, or of one GPU.

    Args:
        device: Where the contender runs.
        is_alone: Whether the process holds nothing but the contender; otherwise a peak on a CPU has no meaning.
    """

    def __init__(self, device: torch.device, is_alone: bool) -> None:
        self._device, self._is_alone = device, is_alone
        self._before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        self.reset()

    def reset(self) -> None:
        """Begins a new peak at the present size."""
        if self._device.type == "cuda":
            reset_cuda_peak(self._device)
        elif self._is_alone:
            reset_resident_peak()

    def peak_mib(self) -> float | None:
        """Returns the peak since the last reset, in MiB; `None` where it is not known."""
        if self._device.type == "cuda":
            return (torch.cuda.max_memory_allocated(self._device) - self._before) / 2**20
        return resident_peak_mib() if self._is_alone else None


def give_back_memory() -> None:
    """Releases unused memory, which the C library and torch's CUDA allocator would keep from the contenders."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def require_memory(name: str, size_mib: float) -> None:
    """Refuses to load a contender that does not fit into memory: without swap the machine would come to a standstill.

    Args:
        name: The contender.
        size_mib: Its size on disk in MiB.

    Raises:
        MachineError: There is not enough memory left.
    """
    needed, available = _PROCESS_MIB + _LOADING * size_mib, available_mib()
    if available is not None and available < needed:
        raise MachineError(
            f"'{name}' needs about {needed:,.0f} MiB of memory besides the contenders that are loaded, and"
            f" {available:,.0f} MiB are left.",
            hint="--no-compiled, one of the --bits, or no --against",
        )


def available_mib() -> float | None:
    """Returns the memory that is available to new processes, in MiB; `None` where the system does not report it."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    match = re.search(r"^MemAvailable:\s*(\d+) kB", text, re.MULTILINE)
    return None if match is None else int(match[1]) / 2**10
