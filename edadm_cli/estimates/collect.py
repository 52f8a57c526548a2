"""Estimates the cost of collecting from a few short samplings."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.artifacts import Estimate, RunFolder
from edadm_cli.collect.building import Task
from edadm_cli.collect.recorder import BatchRecorder
from edadm_cli.collect.stage import prepare
from edadm_cli.config import CollectConfig
from edadm_cli.hooks import Hooks
from edadm_cli.models.gpu_memory import gpu_peak
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.pipeline_calls.encoding import encode_first
from edadm_cli.models.pipeline_calls.sampling import Samples, sample
from edadm_cli.models.placement import is_encoder
from edadm_cli.models.stored import is_stored, num_weights
from edadm_cli.processes import ALONE

_MIB = 2**20
_PROBE_STEPS = 2
_QUICK_S = 10.0  # a probe that takes less time is followed by a larger one
_GROWTH = 4
# Outputs alive at once in a forward, in multiples of the largest: input, output, and the skips.
_LIVE_OUTPUTS = 4


@dataclass
class _Probe:
    """One short sampling of `size` images."""

    size: int
    seconds_a_call: float
    seconds_beside_calls: float
    seconds: float
    largest_output_bytes: int
    recorder: BatchRecorder


def estimate(config: CollectConfig, run_folder: RunFolder) -> Estimate:
    """Estimates time, memory and disk from a few short samplings; nothing is written."""
    started = time.monotonic()
    task = prepare(config, ALONE)
    loading = time.monotonic() - started
    cost = _cost(task)
    return cost.model_copy(update={"seconds": cost.seconds + loading})


def _cost(task: Task) -> Estimate:
    """Estimates a collection: time from timed denoiser calls, disk and memory from the shapes they saw.

    One image is sampled over two steps, then more images at a time as long as that is quick. The cost of a whole batch
    is extrapolated on the straight line through the last two probes.
    """
    model, batch_size, samplings = task.model, task.batch_size, (task.prompts, task.guidance_scale)
    loaded, encoders = _weight_bytes(model), _weight_bytes(model, only_encoders=True)
    with gpu_peak(model.pipeline.device) as encoding_peak:
        encode_first(model, _short_samplings(model, batch_size, *samplings))
    with gpu_peak(model.pipeline.device) as sampling_peak:
        probes = _growing_probes(model, batch_size, *samplings)
    recorder, largest = probes[0].recorder, probes[0].largest_output_bytes
    calls = task.num_steps + len(recorder.latents) - _PROBE_STEPS
    latents = calls * _bytes(recorder.latents[:1])
    condition = _bytes([*recorder.condition.values(), *recorder.unconditional.values()])
    features = calls * _bytes(recorder.features[:1])
    scratch = task.num_trajectories * condition + task.feature_batch * features
    batch = batch_size * (latents + condition) + min(batch_size, task.feature_batch) * features
    rows = max(batch, 2 * task.feature_batch * features)
    activations = max(_LIVE_OUTPUTS * largest * batch_size, sampling_peak.bytes / probes[-1].size * batch_size)
    on_gpu = model.pipeline.device.type == "cuda"
    through_host = max((_bytes(part.parameters()) for part in _modules(model)), default=0) if model.folder else 0
    sampling = _weight_bytes(model) + activations
    return Estimate(
        seconds=_seconds(task, probes, calls),
        memory_mib=(max(sampling, loaded + encoding_peak.bytes) + (0 if on_gpu else rows)) / _MIB,
        host_memory_mib=(rows + max(through_host, encoders)) / _MIB if on_gpu else None,
        disk_mib=(task.num_trajectories * latents + 2 * scratch) / _MIB,  # merging writes conditions and features again
    )


def _seconds(task: Task, probes: list[_Probe], calls: int) -> float:
    """Returns the seconds of all batches, in each of which the denoiser runs `calls` steps."""
    a_call = _extrapolate(probes, [probe.seconds_a_call for probe in probes], task.batch_size)
    beside_calls = _extrapolate(probes, [probe.seconds_beside_calls for probe in probes], task.batch_size)
    of_calls = a_call * calls * probes[0].recorder.calls_per_step
    return (of_calls + beside_calls) * math.ceil(task.num_trajectories / task.batch_size)


def _weight_bytes(model: LoadedModel, only_encoders: bool = False) -> int:
    """Returns the bytes of the weights that are in memory, and of the largest one that is read when it is used."""
    parts = {name: part for name, part in model.pipeline.components.items() if isinstance(part, nn.Module)}
    chosen = [part for name, part in parts.items() if not only_encoders or is_encoder(name)]
    stored = [num_weights(module) for part in chosen for module in part.modules() if is_stored(module)]
    itemsize = next(model.denoiser.parameters()).element_size()
    return _bytes(parameter for part in chosen for parameter in part.parameters()) + itemsize * max(stored, default=0)


def _sizes(batch_size: int) -> Iterator[int]:
    """Gives the numbers of images that are sampled at a time, each some times the one before."""
    size = 1
    while size < batch_size:
        yield size
        size = min(_GROWTH * size, batch_size)
    yield size


def _growing_probes(
    model: LoadedModel, batch_size: int, prompts: list[str] | None, guidance_scale: float | None
) -> list[_Probe]:
    probes: list[_Probe] = []
    for size in _sizes(batch_size):
        if probes and probes[-1].seconds >= _QUICK_S:
            break
        probes.append(_sample_short(model, size, prompts, guidance_scale))
    return probes


def _short_samplings(
    model: LoadedModel, batch_size: int, prompts: list[str] | None, guidance_scale: float | None
) -> list[Callable[[], Samples]]:
    """Returns the samplings of all probes, for their prompts to be encoded first."""
    return [partial(_sample, model, size, prompts, guidance_scale) for size in _sizes(batch_size)]


def _sample(model: LoadedModel, num_images: int, prompts: list[str] | None, guidance_scale: float | None) -> Samples:
    chosen = None if prompts is None else (prompts * num_images)[:num_images]
    return sample(model, seeds=range(num_images), prompts=chosen, num_steps=_PROBE_STEPS, guidance_scale=guidance_scale)


def _extrapolate(probes: list[_Probe], seconds: list[float], batch_size: int) -> float:
    """Returns the seconds at `batch_size` on the line through the last two probes, or in proportion to one."""
    last = probes[-1].size
    if len(probes) == 1:
        return seconds[-1] * batch_size
    slope = (seconds[-1] - seconds[-2]) / (last - probes[-2].size)
    return seconds[-1] + max(0.0, slope) * (batch_size - last)


def _sample_short(
    model: LoadedModel, num_images: int, prompts: list[str] | None, guidance_scale: float | None
) -> _Probe:
    recorder = BatchRecorder(model, num_images, num_features=1)
    with recorder.recording(), _timed_calls(model.denoiser) as times, _largest_output(model) as largest:
        start = time.perf_counter()
        _sample(model, num_images, prompts, guidance_scale)
        seconds = time.perf_counter() - start
    beside = max(0.0, seconds - sum(times))
    return _Probe(num_images, min(times), beside, seconds, largest[0], recorder)


@contextmanager
def _timed_calls(denoiser: nn.Module) -> Iterator[list[float]]:
    times: list[float] = []
    started = 0.0

    def before(module: nn.Module, args: Any) -> None:
        nonlocal started
        _synchronize()
        started = time.perf_counter()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        _synchronize()
        times.append(time.perf_counter() - started)

    with Hooks() as hooks:
        hooks.before(denoiser, before)
        hooks.after(denoiser, after)
        yield times


@contextmanager
def _largest_output(model: LoadedModel) -> Iterator[list[int]]:
    """Yields a list with one number, which becomes the bytes of the largest output of any layer of the pipeline."""
    largest = [0]

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            largest[0] = max(largest[0], _bytes([output]))

    leaves = [m for part in _modules(model) for m in part.modules() if next(m.children(), None) is None]
    with Hooks() as hooks:
        for leaf in leaves:
            hooks.after(leaf, after)
        yield largest


def _modules(model: LoadedModel) -> list[nn.Module]:
    return [part for part in model.pipeline.components.values() if isinstance(part, nn.Module)]


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
