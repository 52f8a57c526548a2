"""Which implementation an operation runs: a kernel, in CUDA C++ or in Triton, or the plain torch reference."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
import triton
from torch import Tensor

from edadm_kernels import hopper

Backend = Literal["triton", "reference"]

HOPPER = (9, 0)
ENVIRONMENT = "EDADM_KERNELS_BACKEND"
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)  # read by `triton.jit` when a kernel is defined


def _from_environment() -> Backend | None:
    name = os.environ.get(ENVIRONMENT)
    if name is None or name == "triton" or name == "reference":
        return name  # type: ignore[return-value]
    raise ValueError(f"{ENVIRONMENT} is expected as triton or reference, found {name!r}")


_default = _from_environment()
_forced: ContextVar[Backend | None] = ContextVar("edadm_kernels_backend", default=None)


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Run the operations of a block by the Triton kernels alone (`triton`) or by the reference (`reference`).

    Without it, or EDADM_KERNELS_BACKEND, tensors on CUDA and all tensors under TRITON_INTERPRET=1 go to the kernels,
    on compute capability 9.0 to those in CUDA C++ where these take the shape, and others to the reference.

    Raises:
        ValueError: Another name.
    """
    if name not in ("triton", "reference"):
        raise ValueError(f"the backend triton or reference is expected, found {name!r}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def uses_kernel(x: Tensor) -> bool:
    """Whether an operation on `x` runs a kernel, not the reference.

    Raises:
        RuntimeError: The kernel is demanded where it cannot run.
    """
    runs = x.is_cuda or INTERPRETED
    forced = _forced.get() or _default
    if forced == "triton" and not runs:
        raise RuntimeError(
            f"a CUDA tensor is expected by the backend triton, found one on {x.device}; set "
            "TRITON_INTERPRET=1 to interpret the kernels"
        )
    return runs if forced is None else forced == "triton"


def uses_hopper(x: Tensor) -> bool:
    """Whether an operation on `x` runs its kernel in CUDA C++, where there is one that takes its shape."""
    if not x.is_cuda or (_forced.get() or _default) is not None:
        return False
    return torch.cuda.get_device_capability(x.device) == HOPPER and hopper.is_available()


def fuses_gelu(x: Tensor) -> bool:
    """Whether `linear_gelu` on the device of `x` is one launch; elsewhere it only stands for several."""
    return not x.is_cuda or uses_hopper(x)
