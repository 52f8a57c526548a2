"""Describes a contender and its environment as plain data, so that another process can load it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call of a denoiser."""
TORCH = "torch"


@dataclass(frozen=True)
class Spec:
    """A contender, ready to be loaded.

    Attributes:
        name: Its name in tables and plots.
        engine: `torch`, the name of an engine, or the name of a peer.
        runs_on: The engine that runs it; `torch` for torch.
        dtype: Name of the element type of what is not quantized.
        bits: Bit width, or `float8`; `None` for full precision.
        compiled: Whether torch.compile compiles it, or an engine ahead of time.
        folder: Folder of the torch denoiser, or of the engine's files.
        size_mib: Size of its weights or files in MiB.
        graphs: Whether a call is replayed as a CUDA graph.
        channels_last: Whether torch stores the activations of convolutions with the channels last.
        denoiser_class: Module and name of the denoiser's class, for contenders that torch runs.
        variant: The form, for a peer that has several.
        settings: File of the values that the preparation measured, such as ranges; `None` if there is none.
    """

    name: str
    engine: str
    runs_on: str
    dtype: str
    bits: str | None
    compiled: bool
    folder: Path | None
    size_mib: float
    graphs: bool = False
    channels_last: bool = False
    denoiser_class: str | None = None
    variant: str = ""
    settings: Path | None = None


@dataclass(frozen=True)
class ContenderEnvironment:
    """The environment of all contenders of a bench.

    Attributes:
        device: The device that they run on.
        threads: Number of CPU threads.
        compile_mode: Mode of torch.compile.
        is_alone: Whether each contender has a process of its own.
    """

    device: str
    threads: int
    compile_mode: str | None
    is_alone: bool


def placed(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Returns calls whose tensors are moved to a device and an element type.

    Tensors with fewer than two dimensions (timesteps) keep their element type. A tensor that occurs several times is
    still one tensor afterwards, because an engine may cache what it computes from it.
    """
    moved: dict[int, Tensor] = {}

    def place(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in moved:
                target = dtype if value.is_floating_point() and value.ndim > 1 else value.dtype
                moved[id(value)] = value.to(device, target)
            return moved[id(value)]
        if isinstance(value, Mapping):
            return {key: place(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(place(item) for item in value)
        return value

    return place(value)


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Returns the milliseconds of a call, by the clock on a CPU and by events in the stream on CUDA."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))
    begun = time.perf_counter()
    call()
    return (time.perf_counter() - begun) * 1e3


def folder_mib(folder: Path) -> float:
    """Returns the size of a folder's files in MiB."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20
