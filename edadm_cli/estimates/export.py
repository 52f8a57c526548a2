"""Estimates the cost of an export from a short sampling."""

from __future__ import annotations

import math
import time

from torch import nn

from edadm_cli.artifacts import Estimate, RunFolder
from edadm_cli.config import ExportConfig
from edadm_cli.export.round_trip import FLOAT_BYTES, INTEGER_SAMPLING_LIMIT, quantized_model, sample_images
from edadm_cli.export.sizes import HALF_BYTES, bytes_beside_denoisers
from edadm_cli.export.timing import SMALLEST, memory_to_time
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.gpu_memory import gpu_peak
from edadm_cli.models.loading import resolve_device
from edadm_cli.models.placement import SAMPLING_SHARE, memory_of
from edadm_cli.quant.layers import quantized_layers

_EXACT_BYTES = 9  # per weight of the largest layer: its codes, and the same in float64 for exact integer sums
_BYTES_PER_SECOND = 4e8
"""Bytes that are written, hashed and read back in a second, of what most disks and processors do at least."""


def estimate(config: ExportConfig, run_folder: RunFolder) -> Estimate:
    """Times loading and a short sampling; the pipeline is loaded twice and samples two times, or three with integers.

    Exact integers take about twice as long as quantizing and dequantizing. Memory is that of the process that needs
    most: the one that times a few calls holds full precision and the export.
    """
    started, device = time.monotonic(), resolve_device(config.device)
    source = run_folder.open("reconstruct", str(config.bits))
    model, num_parameters, _ = quantized_model(config, run_folder, source)
    loading = time.monotonic() - started
    collected = CollectedRun.open(run_folder)
    modules = [part for part in model.pipeline.components.values() if isinstance(part, nn.Module)]
    held = sum(tensor.nbytes for module in modules for tensor in (*module.parameters(), *module.buffers()))
    layers = [layer for module in modules for layer in quantized_layers(module).values()]
    floats = sum(FLOAT_BYTES * math.prod(layer.weight_shape) for layer in layers if layer.keeps_float_weight)
    started = time.monotonic()
    with gpu_peak(device) as peak:
        sample_images(config, model, collected, num_steps=1)
    once = (time.monotonic() - started) * collected.num_steps
    seconds = 2 * loading + once * (4 if once <= INTEGER_SAMPLING_LIMIT else 2) + held / _BYTES_PER_SECOND
    on_gpu = device.type == "cuda"
    exact = _EXACT_BYTES * max((math.prod(layer.weight_shape) for layer in layers), default=0)
    weights = held + (peak.bytes if on_gpu else floats) + exact
    if config.measure and num_parameters >= SMALLEST:
        half_bytes = HALF_BYTES * num_parameters + bytes_beside_denoisers(model)
        timed = memory_to_time(num_parameters, half_bytes, device)
        weights = max(weights, timed if timed <= SAMPLING_SHARE * memory_of(device) else 0)
    host = max(sum(tensor.nbytes for tensor in module.parameters()) for module in modules)
    return Estimate(
        seconds=seconds,
        memory_mib=weights / 2**20,
        host_memory_mib=host / 2**20 if on_gpu else None,
        disk_mib=held / 2**20,
    )
