"""Estimates the cost of sampling images from a short sampling of one image."""

from __future__ import annotations

import time
from dataclasses import replace

from torch import nn

from edadm_cli.artifacts import Estimate, RunFolder
from edadm_cli.artifacts.peak import reset_resident_peak, resident_peak_mib
from edadm_cli.config import SampleConfig
from edadm_cli.models.gpu_memory import gpu_peak
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.loading import resolve_device
from edadm_cli.progress import SilentReporter
from edadm_cli.sample.building import load, sample_pictures
from edadm_cli.sample.task import resolve_task

_PROBE_STEPS = 2


def estimate(config: SampleConfig, run_folder: RunFolder) -> Estimate:
    """Estimates time, memory and disk from a short sampling of one image; only missing files of an engine are written.

    Memory is what loading and sampling added to this process at their peak. It includes what an engine holds besides
    the pipeline: compiled graphs, and for a denoiser whose graph fits only some calls its tensors in torch and the
    graphs that the probe converted from them.
    """
    task, device = resolve_task(config, run_folder), resolve_device(config.device)
    pictures = task.pictures
    reset_resident_peak()
    before = resident_peak_mib()
    with gpu_peak(device) as gpu:
        model = load(task, SilentReporter())
        begin = time.perf_counter()
        samples = sample_pictures(model, [replace(pictures[0], num_steps=_PROBE_STEPS)])
        elapsed = time.perf_counter() - begin
    added = resident_peak_mib() - before
    on_gpu = device.type == "cuda"
    return Estimate(
        seconds=elapsed * pictures[0].num_steps / _PROBE_STEPS * len(pictures),
        # memory that the process had freed before is used again, so that less may be added than is held
        memory_mib=gpu.bytes / 2**20 if on_gpu else max(added, _held_mib(model)),
        host_memory_mib=max(added, 0.0) if on_gpu else None,
        disk_mib=samples.images.nbytes * len(pictures) / 2**20,
    )


def _held_mib(model: LoadedModel) -> float:
    """Returns the size of a pipeline's tensors in MiB; an engine's own memory is not among them."""
    parts = [part for part in model.pipeline.components.values() if isinstance(part, nn.Module)]
    return sum(tensor.nbytes for part in parts for tensor in (*part.parameters(), *part.buffers())) / 2**20
