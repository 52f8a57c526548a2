"""Decides which implementation an operation runs: a kernel in CUDA C++ or Triton, or the reference in plain torch."""

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
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)  # `triton.jit` reads it when a kernel is defined


def _from_environment() -> Backend | None:
    name = os.environ.get(ENVIRONMENT)
    if name is None or name == "triton" or name == "reference":
        return name  # type: ignore[return-value]
    raise ValueError(f"triton or reference is expected in {ENVIRONMENT}, found {name!r}")


_default = _from_environment()
_forced: ContextVar[Backend | None] = ContextVar("edadm_kernels_backend", default=None)


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Makes the operations of a `with` block run by the Triton kernels alone (`triton`) or by the `reference`.

    Without it and without EDADM_KERNELS_BACKEND, kernels run for CUDA tensors, and for all tensors under
    TRITON_INTERPRET=1; on compute capability 9.0 the kernels in CUDA C++ run where they support the shape. The
    reference runs for other tensors.

    Raises:
        ValueError: The name is another one.
    """
    if name not in ("triton", "reference"):
        raise ValueError(f"the backend triton or reference is expected, found {name!r}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def uses_kernel(x: Tensor) -> bool:
    """Returns whether an operation on `x` runs a kernel rather than the reference.

    Raises:
        RuntimeError: The backend `triton` is chosen, but `x` is not on a GPU.
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
    """Returns whether an operation on `x` runs a kernel in CUDA C++ if one supports its shape."""
    if not x.is_cuda or (_forced.get() or _default) is not None:
        return False
    return torch.cuda.get_device_capability(x.device) == HOPPER and hopper.is_available()


def fuses_gelu(x: Tensor) -> bool:
    """Returns whether `linear_gelu` is one launch on the device of `x`, rather than several."""
    return not x.is_cuda or uses_hopper(x)
