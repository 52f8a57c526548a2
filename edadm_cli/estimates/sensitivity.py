"""Estimates the cost of a sensitivity measurement from one timed call of the denoiser."""

from __future__ import annotations

import time

import torch

from edadm_cli.artifacts import Estimate, RunFolder
from edadm_cli.config import SensitivityConfig
from edadm_cli.models.units import trace
from edadm_cli.sensitivity.stage import resolve_task

_MIB = 2**20
_FLOAT32_BYTES = 4


def estimate(config: SensitivityConfig, run_folder: RunFolder) -> Estimate:
    """Estimates time, memory and disk: the time of one denoiser call, multiplied by the number of calls."""
    started = time.monotonic()
    task = resolve_task(config, run_folder)
    denoiser = task.collected.load(task.device, torch.float32).denoiser
    calls = task.calls()
    (args, kwargs), steps = calls[0]
    loading = time.monotonic() - started
    traced = trace(denoiser, args, kwargs)  # also warms up
    start = time.perf_counter()
    with torch.no_grad():
        denoiser(*args, **kwargs)
    per_call = time.perf_counter() - start
    widths = len(config.weight_bits) + len(config.activation_bits)
    layer_calls = (len(traced.layers) * widths + len(config.activation_bits) + 1) * len(calls)
    step_calls = task.num_steps * (task.num_steps + 1) * config.num_images / max(1, len(steps))
    weights = sum(parameter.numel() for parameter in denoiser.parameters())
    return Estimate(
        seconds=loading + (layer_calls + step_calls) * per_call,
        memory_mib=2 * _FLOAT32_BYTES * weights / _MIB,
        disk_mib=1.0,
    )
