"""What all launches share: the architecture of the device, and kernels that overlap at their ends.

On compute capability 9.0 a kernel is launched while the last programs of the kernel before it still run, and waits
inside for the results of that kernel (programmatic dependent launch). Its programs are resident when the data is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from edadm_kernels.tiles import INTERPRETER, known_arch

# Shared memory per program by architecture; CUDA programming guide, table 27
PROGRAM_SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
MAX_GRID_ROWS = 65_535
"""The largest size of a grid's second and third dimension; CUDA programming guide, table 27."""
_OVERLAPPING = 90


@triton.jit
def await_previous(OVERLAP: tl.constexpr) -> None:
    """Waits for the kernel before this one and allows the next one to be launched.

    A kernel calls it before its first access to memory.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def arch_of(x: Tensor) -> int:
    """Returns the architecture whose tuning serves `x`, such as 90; 0 for the interpreter."""
    return _capability(x.device) if x.is_cuda else INTERPRETER


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Returns a context for launches: Triton launches on the current device, wherever the arguments are."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def grid_parts(samples: int, rows_per_sample: int) -> Iterator[slice]:
    """Yields ranges of samples whose rows of programs fit the second dimension of a grid; usually one of all samples.

    Attention over the frames of a video has a sample per pixel, so its heads may be more than fit one grid.
    """
    most = max(1, MAX_GRID_ROWS // rows_per_sample)
    for start in range(0, samples, most):
        yield slice(start, min(start + most, samples))


def overlap(arch: int) -> dict[str, Any]:
    """Returns the argument and the launch option of a kernel that calls `await_previous`."""
    return {"OVERLAP": True, "launch_pdl": True} if arch == _OVERLAPPING else {"OVERLAP": False}


@lru_cache(maxsize=64)
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return known_arch(10 * major + minor)
