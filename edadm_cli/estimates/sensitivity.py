"""Estimates the cost of a sensitivity measurement from one timed call of each denoiser."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.artifacts import Estimate, RunFolder
from edadm_cli.config import SensitivityConfig
from edadm_cli.hooks import Hooks
from edadm_cli.models.families import Call
from edadm_cli.models.units import Trace, trace
from edadm_cli.sensitivity.building import NUM_DIRECTIONS, Part, images_at_once, num_images, parts_of
from edadm_cli.sensitivity.task import resolve_task

_MIB = 2**20
_FLOAT32_BYTES = 4
_BACKWARD = 1.3  # a backward pass without gradients of weights, beside a forward pass
_SMALL_CALL = 0.25  # the least time of a call on a GPU beside one of calibration samples: it waits for Python
_KEPT = 4  # numbers that a backward pass needs per number that a layer returns, with those between layers


def estimate(config: SensitivityConfig, run_folder: RunFolder) -> Estimate:
    """Estimates time, memory and disk: the time of one denoiser call, multiplied by the number of calls."""
    started = time.monotonic()
    task = resolve_task(config, run_folder)
    denoisers = {
        place: each.denoiser for place, each in task.collected.load(task.device, torch.float32).by_denoiser().items()
    }
    seconds, kept, weights = time.monotonic() - started, 0.0, 0
    copies = 1 + len(config.weight_bits) + len(config.grouped_bits)  # the weights, and their changes
    for part in parts_of(task):
        of_calls, of_call = _cost(part, denoisers[part.place])
        seconds, kept = seconds + of_calls, max(kept, of_call)
        weights += sum(parameter.numel() for parameter in denoisers[part.place].parameters())
    return Estimate(seconds=seconds, memory_mib=_FLOAT32_BYTES * (copies * weights + kept) / _MIB, disk_mib=1.0)


def _cost(part: Part, denoiser: nn.Module) -> tuple[float, float]:
    """Returns what one denoiser costs: ranges, then forward and back through its steps.

    Returns:
        The seconds that its calls take, and the numbers that one call keeps for its backward passes.
    """
    task, config, calls = part.task, part.task.config, part.calls()
    args, kwargs = calls[0]
    outputs = _num_outputs(trace(denoiser, args, kwargs), (args, kwargs), denoiser)  # also warms up
    start = time.perf_counter()
    with torch.no_grad():
        denoiser(*args, **kwargs)
    per_call = time.perf_counter() - start
    widths = len(config.weight_bits) + len(config.grouped_bits) + len(config.activation_bits)
    passes = 2 + widths + _BACKWARD * NUM_DIRECTIONS
    share = images_at_once(task) / min(task.batch_size, part.num_samples)
    batches = math.ceil(num_images(task) / images_at_once(task))
    step_calls = part.num_steps * passes * batches * max(share, _SMALL_CALL if task.device.type == "cuda" else 0.0)
    return per_call * (len(config.activation_bits) * len(calls) + step_calls), share * outputs * (widths + _KEPT)


def _num_outputs(traced: Trace, call: Call, denoiser: nn.Module) -> int:
    """Returns how many numbers the layers of a denoiser return in a call."""
    count = 0

    def add(_: nn.Module, __: Any, output: Tensor) -> None:
        nonlocal count
        count += output.numel()

    with torch.no_grad(), Hooks() as hooks:
        for layer in traced.layers:
            hooks.after(layer.module, add)
        denoiser(*call[0], **call[1])
    return count
