"""Estimates the cost of sampling images from a short sampling of one image."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from edadm_cli.artifacts import Estimate, RunFolder
from edadm_cli.config import SampleConfig
from edadm_cli.progress import SilentReporter
from edadm_cli.sample.stage import load, prepare, sample_pictures

_PROBE_STEPS = 2


def estimate(config: SampleConfig, run_folder: RunFolder) -> Estimate:
    """Estimates time, memory and disk from a short sampling of one image; nothing is written."""
    task = prepare(config, run_folder)
    pictures, model = task.pictures, load(task, SilentReporter())
    begin = time.perf_counter()
    samples = sample_pictures(model, [replace(pictures[0], num_steps=_PROBE_STEPS)])
    seconds = (time.perf_counter() - begin) * pictures[0].num_steps / _PROBE_STEPS * len(pictures)
    parts = [part for part in model.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    weights = sum(parameter.nbytes for part in parts for parameter in part.parameters())
    return Estimate(
        seconds=seconds,
        memory_mib=2 * weights / 2**20,
        disk_mib=samples.images.nbytes * len(pictures) / 2**20,
    )
