"""Runs a contender: loads, calls, times and profiles it. It is made from plain data, so that any process can run it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from edadm_cli.bench.algorithms import choose_algorithms, torch_at_its_best
from edadm_cli.bench.contenders.registry import load
from edadm_cli.bench.memory import PeakMemory
from edadm_cli.bench.pipeline import ImageTime, PipelineRequest, time_image
from edadm_cli.bench.spec import TORCH, Call, ContenderEnvironment, Spec, milliseconds, placed
from edadm_cli.engines.base import CompiledDenoiser, LayerExecution, OperationTime
from edadm_cli.engines.cuda.capture import GraphedFunction
from edadm_cli.engines.results import require_rows
from edadm_cli.models.denoiser_calls.predictions import prediction_of

WARM_UP_CALLS = 2
"""Calls between the first one and the first that counts, in which caches fill, threads start and memory is mapped."""


class Running:
    """A contender that has been loaded and called once.

    Args:
        spec: The contender.
        environment: Its device and threads.
        calls: A few calls with float32 tensors for each batch size, which are made in turn.
        source: Compiles an engine's denoiser in this process, for contenders that have no files.
    """

    def __init__(
        self,
        spec: Spec,
        environment: ContenderEnvironment,
        calls: Mapping[int, Sequence[Call]],
        source: Callable[[], CompiledDenoiser] | None = None,
    ) -> None:
        self.spec, self._device = spec, torch.device(environment.device)
        if environment.is_alone:
            torch.set_num_threads(environment.threads)
        self._memory = PeakMemory(self._device, environment.is_alone)
        started = time.perf_counter()
        self._function = load(spec, environment) if source is None else source()
        self._is_torch = spec.runs_on == TORCH
        # inputs and outputs of graphs in files are float32 on a CPU, whatever type they compute in
        is_graph = not self._is_torch and source is None and self._device.type == "cpu"
        dtype = torch.float32 if is_graph else getattr(torch, spec.dtype)
        # moved together: a tensor that calls share, such as the prompt of all steps, is one tensor on the device too
        self._calls = {batch: placed(list(group), self._device, dtype) for batch, group in calls.items()}
        # an output object of an engine's files needs the import of diffusers, which takes longer than loading them
        self._more: dict[str, Any] = {} if self._is_torch or spec.folder is None else {"return_dict": False}
        self._num_calls = 0
        self._chosen: set[int] = set()
        is_cuda = self._device.type == "cuda"
        if is_cuda:
            self._load_peak = self._memory.peak_mib()
        first = next(iter(self._calls))
        self._choose_algorithms(first)
        if is_cuda:
            self._memory.reset()  # a graph allocates its memory when it is recorded, in the first call
        self.prediction = self._predict(first)
        self.load_seconds = time.perf_counter() - started
        # on a GPU the other contenders are loaded next, in the same process
        self._running_peak = self._memory.peak_mib() if is_cuda else None
        if not is_cuda:
            self._load_peak = self._memory.peak_mib()
            self._memory.reset()

    def warm_up(self, batch_size: int) -> float:
        """Calls until caches are warm, and returns the last call's milliseconds."""
        self._choose_algorithms(batch_size)
        return self.time(batch_size, WARM_UP_CALLS)[-1]

    def time(self, batch_size: int, count: int) -> list[float]:
        """Returns the milliseconds of each of `count` successive calls, which take the inputs in turn."""
        times = []
        with torch_at_its_best():
            for _ in range(count):
                calls = self._calls[batch_size]
                args, kwargs = calls[self._num_calls % len(calls)]
                self._num_calls += 1
                times.append(milliseconds(partial(self._call, args, kwargs), self._device))
        return times

    def memory(self) -> tuple[float | None, float | None]:
        """Returns the peak memory in MiB while running (on CUDA of the first batch size), and while loading."""
        return self._running_peak or self._memory.peak_mib(), self._load_peak

    def layers(self) -> tuple[LayerExecution, ...]:
        """Returns how each layer runs; nothing for torch."""
        if not isinstance(self._function, CompiledDenoiser):
            return ()
        return tuple(require_rows(self._function, "layers", self._function.layers, LayerExecution))

    def profile(self, batch_size: int) -> list[OperationTime]:
        """Returns the time of each operation of one call; nothing for torch."""
        if not isinstance(self._function, CompiledDenoiser):
            return []
        args, kwargs = self._calls[batch_size][0]
        with torch_at_its_best():
            if self._device.type == "cuda":
                self._function.profile(*args, **kwargs)  # the first profile includes the start of the profiler
            return require_rows(self._function, "profile", self._function.profile(*args, **kwargs), OperationTime)

    def time_image(self, request: PipelineRequest) -> ImageTime:
        """Returns the time of one whole image; see `bench.pipeline`."""
        timing = partial(time_image, request, self._function, self._device, self._is_torch, self.spec.dtype)
        return choose_algorithms(timing, self._device)

    @torch.no_grad()
    def _choose_algorithms(self, batch_size: int) -> None:
        """Lets cuDNN try its algorithms in one call at a new size, so that no later call needs memory for that.

        Engines use hardly any convolutions of cuDNN, so only torch's contenders need it.
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
        return self._function(*args, **(kwargs | self._more))

    def _predict(self, batch_size: int) -> Tensor:
        args, kwargs = self._calls[batch_size][0]
        with torch_at_its_best():
            return prediction_of(self._call(args, kwargs)).detach().float().cpu()
