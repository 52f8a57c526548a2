"""Lets cuDNN choose the algorithms of convolutions on CUDA for the contenders of a bench, within a memory limit.

cuDNN times its algorithms and takes the fastest, and float32 convolutions may use TF32. Only what `bench` times runs
like that: elsewhere results have to be repeatable, and float32 has to mean float32 (see `resolve_device`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch

_WORKSPACE_BYTES = 8 * 2**30
"""Memory that an algorithm may take while it is tried, including the tensors of the call itself.

cuDNN asks for the memory of its most demanding algorithm, and torch grants it up to all free memory. For wide 3x3
convolutions that is a large part of any GPU. The chosen algorithms need little: Stable Diffusion 1.5 in float32 with
two rows, with algorithms chosen without a limit, ran in 0.3 GiB beside its weights (docs/gpu.md).
"""
Result = TypeVar("Result")


@contextmanager
def torch_at_its_best() -> Iterator[None]:
    """Runs convolutions as torch does by default, with TF32, and lets cuDNN try its algorithms at new shapes."""
    convolutions = torch.backends.cudnn
    before = convolutions.allow_tf32, convolutions.benchmark
    convolutions.allow_tf32 = convolutions.benchmark = True
    try:
        yield
    finally:
        convolutions.allow_tf32, convolutions.benchmark = before


def choose_algorithms(call: Callable[[], Result], device: torch.device) -> Result:
    """Returns the result of a call in which cuDNN tries its algorithms, except those that need too much memory.

    torch halves the memory that it requests for the trials until the request succeeds. If the tensors of the call
    itself do not fit into the limit, the call is repeated without a limit.

    Args:
        call: A function without arguments that runs convolutions.
        device: The device of the call; there is a limit on CUDA only.
    """
    with torch_at_its_best():
        if device.type == "cuda":
            with suppress(torch.OutOfMemoryError), _limited(device):
                return call()
        return call()


@contextmanager
def _limited(device: torch.device) -> Iterator[None]:
    """Limits this process to the GPU memory that it has reserved already plus `_WORKSPACE_BYTES`."""
    index = torch.cuda.current_device() if device.index is None else device.index
    before = torch.cuda.get_per_process_memory_fraction(index)
    total = torch.cuda.get_device_properties(index).total_memory
    limit = (torch.cuda.memory_reserved(index) + _WORKSPACE_BYTES) / total
    torch.cuda.set_per_process_memory_fraction(min(before, limit), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, index)
