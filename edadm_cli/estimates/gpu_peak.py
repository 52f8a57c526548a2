"""Measures what work adds to the memory of a GPU at its peak, with the workspaces of libraries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from edadm_cli.artifacts.peak import reset_cuda_peak


@dataclass
class GpuPeak:
    """What was measured.

    Attributes:
        bytes: Bytes at the peak, beyond those that were allocated before; 0 on a CPU.
    """

    bytes: int = 0


@contextmanager
def gpu_peak(device: torch.device) -> Iterator[GpuPeak]:
    """Measures the body; its value is filled in when the body ends."""
    peak = GpuPeak()
    if device.type != "cuda":
        yield peak
        return
    before = torch.cuda.memory_allocated(device)
    reset_cuda_peak(device)
    yield peak
    peak.bytes = max(0, torch.cuda.max_memory_allocated(device) - before)
