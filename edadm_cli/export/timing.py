"""Measures how much faster an export is than full precision, by a few calls of both denoisers on this machine.

The export runs on the engine that `edadm_cli.load` chooses, and full precision runs in torch's eager mode. The two are
timed in turns, in a separate process, because libraries that compile graphs can crash. `edadm bench` measures more
thoroughly, and compares with compiled floating point.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edadm_cli.artifacts import CallTime, RunFolder
from edadm_cli.engines.base import MIXED, CompiledDenoiser, EngineOptions, LayerExecution
from edadm_cli.engines.files import example
from edadm_cli.engines.isolation import IsolatedProcess, ProcessLostError
from edadm_cli.engines.registry import default_engine
from edadm_cli.errors import MachineError
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.loading import load_model, resolve_device
from edadm_cli.models.placement import SAMPLING_SHARE, memory_of

SMALLEST = 500_000
"""The number of weights below which a denoiser is not timed, because Python takes most of the time of its calls."""
SLOW = 1.1
"""The least factor at which an export is called faster."""
BUSY = 2.0
"""The largest ratio of the median to the smallest time. A larger ratio means that other programs disturb the times."""
_GIB = 2**30
_ROUNDS, _FEWEST_ROUNDS, _SECONDS = 9, 3, 4.0
"""Each denoiser is called `_ROUNDS` times, or at least `_FEWEST_ROUNDS` times once `_SECONDS` have passed."""


def time_calls(run: RunFolder, export: Path, device: torch.device) -> CallTime:
    """Times one call of the denoiser for one image, once exported and once at full precision.

    Args:
        run: The run of the export.
        export: The folder of the exported pipeline.
        device: The device that both run on.

    Raises:
        MachineError: There is no engine for the device, its library crashed, or other programs kept the machine busy.
        EdadmError: The engine cannot run the export.
    """
    lost = partial(ProcessLostError, "The measurement of a few calls", hint="edadm bench")
    process = IsolatedProcess(lost, _Pair, run.root, export, str(device))
    try:
        return process.call(_Pair.measure)
    finally:
        process.close()


def memory_to_time(num_weights: int, half_bytes: int, device: torch.device) -> int:
    """Returns the bytes that the weights of both denoisers take while they are timed.

    Full precision is loaded as a whole pipeline, in float32 on a CPU and in 16 bits on a GPU, and a code of the export
    takes one byte.

    Args:
        num_weights: The number of weights of the denoisers.
        half_bytes: The bytes of the full-precision pipeline's weights in float16.
        device: The device that both run on.
    """
    return (1 if device.type == "cuda" else 2) * half_bytes + num_weights


def require_memory_to_time(needed: int, device: torch.device) -> None:
    """Checks that full precision and the export fit into the device's memory together.

    Raises:
        MachineError: They do not.
    """
    if needed > SAMPLING_SHARE * memory_of(device):
        raise MachineError(
            f"full precision and the export take {needed / _GIB:.1f} GiB together, and at most"
            f" {SAMPLING_SHARE:.0%} of the {memory_of(device) / _GIB:.1f} GiB of {device} were expected."
        )


def element_type(device: torch.device, collected: torch.dtype) -> torch.dtype:
    """Returns the type of full precision while it is timed: on a GPU that of `collect` if it is short, else float16."""
    if device.type == "cpu":
        return torch.float32
    return collected if collected.itemsize == torch.float16.itemsize else torch.float16


def speed_sentences(measured: CallTime) -> list[str]:
    """Returns sentences that say what was measured, and in which element types the engine computes."""
    times = (
        f"one call of the denoiser takes {measured.milliseconds:.3g} ms on the engine '{measured.engine}', and"
        f" {measured.full_precision_milliseconds:.3g} ms at full precision in torch's eager mode ({measured.dtype})"
    )
    if measured.factor < SLOW:
        speed = f"The export is not faster on this machine: {times}. edadm bench shows where the time goes."
    else:
        speed = f"The export is {measured.factor:.3g} times as fast on this machine: {times}."
    counts = [f"{count:,} layers {_in(precision)}" for precision, count in measured.layers.items()]
    counts += [f"the products of {count:,} attentions {_in(name)}" for name, count in measured.attention.items()]
    if not counts:
        return [speed]
    listed = " and ".join([*([", ".join(counts[:-1])] if counts[:-1] else []), counts[-1]])
    return [speed, f"The engine '{measured.engine}' computes {listed}."]


def _in(precision: str) -> str:
    return "partly in int8" if precision == MIXED else f"in {precision}"


def _by_precision(layers: Iterable[LayerExecution]) -> dict[str, int]:
    return dict(sorted(Counter(layer.precision for layer in layers).items()))


class _Pair:
    """Holds the two denoisers that are timed: the exported one on its engine, and the full-precision one."""

    def __init__(self, run_root: Path, export: Path, device: str) -> None:
        run, self.device = RunFolder(run_root), resolve_device(device)
        collected = CollectedRun.open(run)
        self.dtype = element_type(self.device, collected.dtype)
        self.engine = default_engine(self.device)
        self.engine.require(self.device)
        self.args, self.kwargs = example(run, self.device, self.dtype)
        model = load_model(str(export), self.device, self.dtype, collected.entry)
        options = EngineOptions(self.device, self.dtype)
        self.exported: CompiledDenoiser = self.engine.compile(model.denoiser, self.args, self.kwargs, options)
        del model
        self.full: nn.Module = collected.load(self.device, self.dtype).denoiser.eval()

    @torch.no_grad()
    def measure(self) -> CallTime:
        """Returns the median times of calls in turns, after one call of each denoiser that is not counted.

        Raises:
            MachineError: Other programs kept the machine busy, so that the times differ too much.
        """
        contenders: tuple[Callable[..., Any], ...] = (self.exported, self.full)
        times: tuple[list[float], list[float]] = ([], [])
        for contender in contenders:
            self._call(contender)
        started = time.perf_counter()
        for number in range(_ROUNDS):
            if number >= _FEWEST_ROUNDS and time.perf_counter() - started > _SECONDS:
                break
            for contender, values in zip(contenders, times, strict=True):
                values.append(self._call(contender))
        exported, full = map(statistics.median, times)
        for values in times:
            if statistics.median(values) > BUSY * min(values):
                raise MachineError(
                    f"other programs keep this machine busy, since equal calls took {min(values):,.1f} to"
                    f" {max(values):,.1f} ms.",
                    hint="edadm bench",
                )
        layers = self.exported.layers
        return CallTime(
            engine=self.engine.name,
            dtype=str(self.dtype).removeprefix("torch."),
            milliseconds=exported,
            full_precision_milliseconds=full,
            calls=len(times[0]),
            factor=full / exported,
            layers=_by_precision(layer for layer in layers if layer.kind != "attention"),
            attention=_by_precision(layer for layer in layers if layer.kind == "attention"),
        )

    def _call(self, contender: Callable[..., Any]) -> float:
        """Returns the time of one call, in milliseconds."""
        self._wait()
        started = time.perf_counter()
        contender(*self.args, **self.kwargs)
        self._wait()
        return 1e3 * (time.perf_counter() - started)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
