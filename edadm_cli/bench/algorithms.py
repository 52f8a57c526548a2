"""Convolutions of the contenders on CUDA: the algorithms that cuDNN finds fastest, tried within bounds of memory.

Only what is timed has them. Elsewhere results are to repeat, and float32 is to mean float32 (see `resolve_device`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch

_WORKSPACE_BYTES = 8 * 2**30
"""That an algorithm may take while it is tried, the call's own tensors included.

torch allocates what the hungriest algorithm asks for, up to all that is free, and for wide 3x3 convolutions that is a
large part of any card. What is chosen takes little: Stable Diffusion 1.5 in float32, two rows, its algorithms chosen
without a bound, ran in 0.3 GiB beside its weights (docs/gpu.md).
"""
Result = TypeVar("Result")


@contextmanager
def torch_at_its_best() -> Iterator[None]:
    """Convolutions as torch's users have them: TF32 in float32, and cuDNN tries its algorithms at new shapes."""
    convolutions = torch.backends.cudnn
    before = convolutions.allow_tf32, convolutions.benchmark
    convolutions.allow_tf32 = convolutions.benchmark = True
    try:
        yield
    finally:
        convolutions.allow_tf32, convolutions.benchmark = before


def choose_algorithms(call: Callable[[], Result], device: torch.device) -> Result:
    """Returns the result of a call in which cuDNN tries its algorithms; those that want too much memory are not tried.

    torch halves the memory that it wants for them until it gets it. A call whose own tensors do not fit is made again
    with all of the card.
    """
    with torch_at_its_best():
        if device.type == "cuda":
            with suppress(torch.OutOfMemoryError), _limited(device):
                return call()
        return call()


@contextmanager
def _limited(device: torch.device) -> Iterator[None]:
    """Lets this process take no more of the card than it has and `_WORKSPACE_BYTES`."""
    index = torch.cuda.current_device() if device.index is None else device.index
    before = torch.cuda.get_per_process_memory_fraction(index)
    total = torch.cuda.get_device_properties(index).total_memory
    limit = (torch.cuda.memory_reserved(index) + _WORKSPACE_BYTES) / total
    torch.cuda.set_per_process_memory_fraction(min(before, limit), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, index)
