"""Estimates the cost of an export from a short sampling."""

from __future__ import annotations

import time

import torch

from edadm_cli.artifacts import Estimate, RunFolder
from edadm_cli.config import ExportConfig
from edadm_cli.export.stage import FLOAT_BYTES, INTEGER_SAMPLING_LIMIT, quantized_model, sample_images
from edadm_cli.models.collected import CollectedRun


def estimate(config: ExportConfig, run_folder: RunFolder) -> Estimate:
    """Estimates from a short sampling: an export samples twice, and once more in integers if that is not too slow."""
    source = run_folder.open("reconstruct", str(config.bits))
    model, num_parameters, _ = quantized_model(config, run_folder, source)
    collected = CollectedRun.open(run_folder)
    started = time.monotonic()
    sample_images(config, model, collected, num_steps=1)
    once = (time.monotonic() - started) * collected.num_steps
    seconds = once * (4 if once <= INTEGER_SAMPLING_LIMIT else 2)
    weights = num_parameters * FLOAT_BYTES / 2**20
    if model.folder is not None:
        files = sum(file.stat().st_size for file in model.folder.rglob("*") if file.is_file()) / 2**20
    else:
        parts = [part for part in model.pipeline.components.values() if isinstance(part, torch.nn.Module)]
        files = sum(parameter.nbytes for part in parts for parameter in part.parameters()) / 2**20
    return Estimate(seconds=seconds, memory_mib=3 * weights, disk_mib=files)
