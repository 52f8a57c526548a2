"""Estimates the cost of a sensitivity measurement from one timed call of the denoiser."""

from __future__ import annotations

import time

import torch
from torch import nn

from edadm_cli.artifacts import Estimate, RunFolder
from edadm_cli.config import SensitivityConfig
from edadm_cli.models.units import trace
from edadm_cli.sensitivity.building import Part, parts_of
from edadm_cli.sensitivity.task import resolve_task

_MIB = 2**20
_FLOAT32_BYTES = 4


def estimate(config: SensitivityConfig, run_folder: RunFolder) -> Estimate:
    """Estimates time, memory and disk: the time of one denoiser call, multiplied by the number of calls."""
    started = time.monotonic()
    task = resolve_task(config, run_folder)
    denoisers = {
        place: each.denoiser for place, each in task.collected.load(task.device, torch.float32).by_denoiser().items()
    }
    seconds = time.monotonic() - started
    parts = parts_of(task)
    runs = sum(part.num_steps + 1 for part in parts)  # of the sampler, in which every denoiser is called
    for part in parts:
        seconds += _seconds(part, denoisers[part.place], runs)
    weights = sum(parameter.numel() for denoiser in denoisers.values() for parameter in denoiser.parameters())
    return Estimate(seconds=seconds, memory_mib=2 * _FLOAT32_BYTES * weights / _MIB, disk_mib=1.0)


def _seconds(part: Part, denoiser: nn.Module, runs: int) -> float:
    """Returns the seconds that the calls of one denoiser take, in some runs of the sampler and layer by layer."""
    config, calls = part.task.config, part.calls()
    (args, kwargs), steps = calls[0]
    traced = trace(denoiser, args, kwargs)  # also warms up
    start = time.perf_counter()
    with torch.no_grad():
        denoiser(*args, **kwargs)
    per_call = time.perf_counter() - start
    widths = len(config.weight_bits) + len(config.grouped_bits) + len(config.activation_bits)
    layer_calls = (len(traced.layers) * widths + len(config.activation_bits) + 1) * len(calls)
    runs += len(traced.layers)  # with each layer alone quantized
    step_calls = part.num_steps * runs * config.num_images / max(1, len(steps))
    return (layer_calls + step_calls) * per_call
