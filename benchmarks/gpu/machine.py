"""Describes the machine of a session: its versions, its GPU, and what the GPU reaches."""

from __future__ import annotations

import os
import platform
import subprocess
from typing import Any

import torch

from edadm_cli.bench.roofline import DEVICES, DevicePeak
from gpu.timing import Clock

_QUERY = "--query-gpu=driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"


def versions() -> dict[str, Any]:
    """Returns the versions of the libraries, and the number of processors."""
    import diffusers
    import triton

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "diffusers": diffusers.__version__,
        "cpus": os.cpu_count(),
    }


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """Returns the facts about a GPU that decide its speed."""
    properties = torch.cuda.get_device_properties(device)
    seen = subprocess.run(["nvidia-smi", _QUERY, "--format=csv,noheader"], capture_output=True, text=True, check=False)
    return {
        "gpu": properties.name,
        "arch": 10 * properties.major + properties.minor,
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": properties.total_memory / 1e9,
        "l2_mb": properties.L2_cache_size / 1e6,
        "cudnn": torch.backends.cudnn.version(),
        "nvidia_smi": seen.stdout.strip(),
    }


def peaks(device: torch.device, clock: Clock) -> DevicePeak:
    """Returns the peaks of a GPU by its data sheet, or measured peaks for an unknown one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    known = next((peak for peak in DEVICES if peak.name in name), None)
    if known is not None:
        return known
    measured = measured_peaks(device, clock)
    return DevicePeak(name, measured["float16_tflops"], measured["int8_tops"], measured["copy_gb_s"])


def measured_peaks(device: torch.device, clock: Clock) -> dict[str, float]:
    """Measures what a device reaches with random data: a copy, a float16 and an int8 product; smaller ones on a CPU."""
    on_cuda = device.type == "cuda"
    size = 8192 if on_cuda else 256
    source = torch.empty(1 << (30 if on_cuda else 20), dtype=torch.int32, device=device).random_()
    copied = clock.launch_us([lambda: source.clone()], replays=3)
    a = torch.randn(size, size, device=device, dtype=torch.float16)
    b = torch.randint(-128, 128, (size, size), device=device, dtype=torch.int8)
    operations = 2 * size**3
    return {
        "copy_gb_s": 2 * source.numel() * 4 / copied / 1e3,
        "float16_tflops": operations / clock.launch_us([lambda: a @ a.T]) / 1e6,
        "int8_tops": operations / clock.launch_us([lambda: torch._int_mm(b, b.T)]) / 1e6,
    }
