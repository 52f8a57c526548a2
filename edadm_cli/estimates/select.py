"""Estimates the cost of a selection from sizes on disk and a timed part of the features."""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path

import torch

from edadm_cli.artifacts import Estimate, RunFolder
from edadm_cli.config import SelectConfig
from edadm_cli.models.collected import CollectedRun
from edadm_cli.select.building import PLOT_FILE, feature_slices
from edadm_cli.select.plot import draw_selection
from edadm_cli.select.task import Task, resolve_task
from edadm_cli.select.tdac import rows_at_once, score_slices

_MIB = 2**20


def estimate(config: SelectConfig, run_folder: RunFolder) -> Estimate:
    """Estimates time, memory and disk from sizes on disk and a timed part of the features."""
    collected = CollectedRun.open(run_folder)
    costs = [_of_denoiser(resolve_task(config, collected, place)) for place in collected.places]
    return Estimate(
        seconds=sum(cost.seconds for cost in costs),
        memory_mib=max(cost.memory_mib for cost in costs),
        disk_mib=sum(cost.disk_mib for cost in costs),
    )


def _of_denoiser(task: Task) -> Estimate:
    shape, portions = feature_slices(task.artifact)
    score_slices([next(portions)])  # the first call also warms up
    again = next(portions, None)
    start = time.perf_counter()
    score_slices([next(feature_slices(task.artifact)[1]) if again is None else again])
    seconds = (time.perf_counter() - start) * math.ceil(shape[1] / rows_at_once(shape))
    seconds += _plotting_seconds(len(task.timesteps))
    payload = {entry.path: entry.bytes for entry in task.artifact.manifest.payload}
    share = task.num_samples / task.num_trajectories
    latents = [size for name, size in payload.items() if name.startswith("latents-")]
    calibration = share * (sum(latents) / len(task.timesteps) + payload["condition.safetensors"])
    portion = 8 * 3 * math.prod(shape[2:]) * shape[0] * rows_at_once(shape)
    memory = portion + 2 * calibration + max(latents) + payload["condition.safetensors"]
    return Estimate(seconds=seconds, memory_mib=memory / _MIB, disk_mib=calibration / _MIB)


def _plotting_seconds(num_steps: int) -> float:
    """Returns the seconds of the plot, most of which are the import of its library."""
    nothing = torch.zeros(num_steps)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        draw_selection(Path(folder) / PLOT_FILE, "", nothing, nothing, nothing, nothing.long())
    return time.perf_counter() - start
