"""One way to run the denoiser: loaded, called, timed, profiled. Made of plain data, so that it can be made in a process
of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.bench.algorithms import choose_algorithms, torch_at_its_best
from edadm_cli.bench.memory import PeakMemory
from edadm_cli.engines.base import CompiledDenoiser, EngineOptions, FileEngine, LayerExecution, OperationTime
from edadm_cli.engines.cuda.capture import GraphedFunction
from edadm_cli.engines.parity import prediction_of
from edadm_cli.engines.registry import engine as engine_of

Call = tuple[tuple[Any, ...], dict[str, Any]]
TORCH = "torch"
WARM_UP_CALLS = 2
"""Calls after the first and before the first that counts: caches fill, threads wake, memory is mapped."""


@dataclass(frozen=True)
class Spec:
    """What a contender is.

    Attributes:
        name: As people read it.
        engine: `torch`, an engine's name, or a peer's whose files an engine runs.
        runs_on: The engine that runs it; `torch` for torch.
        dtype: Element type of what is not quantized.
        bits: Bit width; `None` for full precision.
        compiled: By torch.compile, or ahead of time by an engine.
        graphs: Whether a call is replayed as a CUDA graph.
        channels_last: Memory order of torch's convolutions.
        folder: Of the torch denoiser, or of the engine's files.
        size_mib: On disk.
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


@dataclass(frozen=True)
class Setting:
    """How contenders run.

    Attributes:
        device: Where.
        threads: CPU threads.
        compile_mode: Of torch.compile.
        is_alone: Whether each has a process of its own.
    """

    device: str
    threads: int
    compile_mode: str | None
    is_alone: bool


class Running:
    """A contender that has been loaded and called once.

    Args:
        spec: What it is.
        setting: How it runs.
        calls: Batch size to a few calls with float32 tensors, gone through in turn.
        source: Compiles what runs, for contenders that have no files: an engine's denoiser in this process.
    """

    def __init__(
        self,
        spec: Spec,
        setting: Setting,
        calls: Mapping[int, Sequence[Call]],
        source: Callable[[], CompiledDenoiser] | None = None,
    ) -> None:
        self.spec, self._device = spec, torch.device(setting.device)
        if setting.is_alone:
            torch.set_num_threads(setting.threads)
        self._memory = PeakMemory(self._device, setting.is_alone)
        started = time.perf_counter()
        self._function = load(spec, setting) if source is None else source()
        self._is_torch = spec.runs_on == TORCH
        # OpenVINO takes and gives float32 whatever it computes in
        dtype = getattr(torch, spec.dtype) if self._is_torch or self._device.type == "cuda" else torch.float32
        # in one go: what the calls share, such as the prompt of all steps, is one tensor on the device too
        self._calls = {batch: placed(list(found), self._device, dtype) for batch, found in calls.items()}
        self._turn = 0
        self._chosen: set[int] = set()
        is_cuda = self._device.type == "cuda"
        if is_cuda:
            self._load_peak = self._memory.peak_mib()
        first = next(iter(self._calls))
        self._choose_algorithms(first)
        if is_cuda:
            self._memory.reset()  # a graph's memory is taken when it is recorded, in the first call
        self.prediction = self._predict(first)
        self.load_seconds = time.perf_counter() - started
        # on a GPU the others come next, in the same process
        self._running_peak = self._memory.peak_mib() if is_cuda else None
        if not is_cuda:
            self._load_peak = self._memory.peak_mib()
            self._memory.reset()

    def warm_up(self, batch_size: int) -> float:
        """Call until caches are warm; returns the last call's milliseconds."""
        self._choose_algorithms(batch_size)
        return self.time(batch_size, WARM_UP_CALLS)[-1]

    def time(self, batch_size: int, count: int) -> list[float]:
        """Milliseconds of each of `count` calls, one after another, inputs in turn."""
        times = []
        with torch_at_its_best():
            for _ in range(count):
                calls = self._calls[batch_size]
                args, kwargs = calls[self._turn % len(calls)]
                self._turn += 1
                times.append(milliseconds(partial(self._call, args, kwargs), self._device))
        return times

    def memory(self) -> tuple[float | None, float | None]:
        """Peak memory in MiB while running (on CUDA of the first batch size), and while loading."""
        return self._running_peak or self._memory.peak_mib(), self._load_peak

    def layers(self) -> tuple[LayerExecution, ...]:
        """How each layer runs; empty for torch."""
        return self._function.layers if isinstance(self._function, CompiledDenoiser) else ()

    def profile(self, batch_size: int) -> list[OperationTime]:
        """Time of each operation of one call; empty for torch."""
        if not isinstance(self._function, CompiledDenoiser):
            return []
        args, kwargs = self._calls[batch_size][0]
        with torch_at_its_best():
            self._function.profile(*args, **kwargs)
            return self._function.profile(*args, **kwargs)

    def draw(self, request: Any) -> tuple[float, float]:
        """Sample one image with the pipeline that `request` names; see `bench.pipeline`."""
        from edadm_cli.bench.pipeline import draw

        drawing = partial(draw, request, self._function, self._device, self._is_torch, self.spec.dtype)
        return choose_algorithms(drawing, self._device)

    @torch.no_grad()
    def _choose_algorithms(self, batch_size: int) -> None:
        """At a new size, one call kernel by kernel in which cuDNN tries its convolutions: no later call needs memory
        for that. An engine has hardly any.
        """
        if batch_size in self._chosen or not self._is_torch or self._device.type != "cuda":
            return
        self._chosen.add(batch_size)
        function = self._function
        eager = function.function if isinstance(function, GraphedFunction) else function
        args, kwargs = self._calls[batch_size][0]
        choose_algorithms(partial(eager, *args, **kwargs), self._device)

    @torch.no_grad()
    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._function(*args, **kwargs)

    def _predict(self, batch_size: int) -> Tensor:
        args, kwargs = self._calls[batch_size][0]
        with torch_at_its_best():
            return prediction_of(self._call(args, kwargs)).detach().float().cpu()


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Time of a call: by the clock on a CPU, by events in the stream on CUDA."""
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


def load(spec: Spec, setting: Setting) -> Callable[..., Any]:
    """Load a contender from its files."""
    device, dtype = torch.device(setting.device), getattr(torch, spec.dtype)
    assert spec.folder is not None
    if spec.runs_on != TORCH:
        engine = engine_of(spec.runs_on)
        assert isinstance(engine, FileEngine)
        options = EngineOptions(device, dtype, setting.threads if device.type == "cpu" else None)
        return engine.load(spec.folder, options)
    denoiser = load_denoiser(spec.folder, dtype)
    if spec.engine == "torchao":
        from edadm_cli.bench.peers import quantize_with_torchao

        quantize_with_torchao(nn.Module.to(denoiser, device))
    return torch_function(denoiser, spec, setting)


def torch_function(denoiser: nn.Module, spec: Spec, setting: Setting) -> Callable[..., Any]:
    """A torch denoiser as a contender runs it: memory order, compilation, CUDA graphs."""
    nn.Module.to(denoiser, torch.device(setting.device))
    if spec.channels_last:
        nn.Module.to(denoiser, memory_format=torch.channels_last)
    function: Callable[..., Any] = denoiser
    if spec.compiled:
        if setting.compile_mode is not None:
            _silence_autotuning()
        function = torch.compile(function, dynamic=False, mode=setting.compile_mode)
    if spec.graphs:
        return GraphedFunction(function)
    return function


def _silence_autotuning() -> None:
    """Keep torch from writing a table of timings for every product to the terminal."""
    from torch._inductor import config

    config.autotune_num_choices_displayed = 0
    config.max_autotune_report_choices_stats = False


def load_denoiser(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Read a full-precision denoiser from a diffusers folder."""
    import diffusers

    from edadm_cli.artifacts import load_json
    from edadm_cli.models.quiet import quiet_libraries

    with quiet_libraries():
        cls: Any = getattr(diffusers, load_json(folder / "config.json")["_class_name"])
        denoiser: nn.Module = cls.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    return denoiser.eval().requires_grad_(False)


def placed(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The tensors of calls on a device, in an element type; what has no two dimensions (timesteps) keeps its own.

    A tensor that stands in several places does so afterwards: an engine may keep what it computed of one.
    """
    found: dict[int, Tensor] = {}

    def place(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in found:
                own = dtype if value.is_floating_point() and value.ndim > 1 else value.dtype
                found[id(value)] = value.to(device, own)
            return found[id(value)]
        if isinstance(value, Mapping):
            return {key: place(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(place(item) for item in value)
        return value

    return place(value)
