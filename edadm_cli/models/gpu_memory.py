"""Measures the memory of a GPU: what work adds at its peak, and what this process may still allocate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from edadm_cli.artifacts.peak import reset_cuda_peak


@dataclass
class GpuPeak:
    """The result of a measurement.

    Attributes:
        bytes: Bytes at the peak, beyond those that were allocated before; 0 on a CPU.
    """

    bytes: int = 0


@contextmanager
def gpu_peak(device: torch.device) -> Iterator[GpuPeak]:
    """Measures the body of `with`, including workspaces of libraries; the value is set when the body ends."""
    peak = GpuPeak()
    if device.type != "cuda":
        yield peak
        return
    before = torch.cuda.memory_allocated(device)
    reset_cuda_peak(device)
    yield peak
    peak.bytes = max(0, torch.cuda.max_memory_allocated(device) - before)


def available_bytes(device: torch.device) -> int:
    """Returns the bytes of a GPU that this process may still allocate.

    They are bounded by the memory that is free, and by the share that `torch.cuda.set_per_process_memory_fraction`
    grants. Blocks that torch's allocator holds without using them count as free.
    """
    free, total = torch.cuda.mem_get_info(device)
    used = torch.cuda.memory_allocated(device)
    unused = torch.cuda.memory_reserved(device) - used
    share = int(torch.cuda.get_per_process_memory_fraction(device) * total) - used
    return max(0, min(free + unused, share))
