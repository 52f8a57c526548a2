"""What every launch has in common: the architecture, and letting kernels overlap at their ends.

Where the device can (compute capability 9.0), a kernel is launched while the one before it drains and waits inside for
that one's results (programmatic dependent launch): its programs are in place when the data is.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from edadm_kernels.tiles import INTERPRETER, known_arch

# By architecture; CUDA programming guide, table 27
PROGRAM_SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
_OVERLAPPING = 90


@triton.jit
def await_previous(OVERLAP: tl.constexpr) -> None:
    """Stand before a kernel's first access to memory: wait for the kernel before, and let the next one be launched."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def arch_of(x: Tensor) -> int:
    """The architecture whose tiles serve `x`, such as 90; 0 for the interpreter."""
    return _capability(x.device) if x.is_cuda else INTERPRETER


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """For launches: Triton launches on the current device and its stream, whatever its arguments lie on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def overlap(arch: int) -> dict[str, Any]:
    """Argument and launch option of a kernel that calls `await_previous`."""
    return {"OVERLAP": True, "launch_pdl": True} if arch == _OVERLAPPING else {"OVERLAP": False}


@lru_cache(maxsize=64)
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return known_arch(10 * major + minor)
