"""Describes the machine of a measurement: processor, memory, GPU and versions. None of it is part of an identity."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

# Instructions that decide which arithmetic is fast, under the names of /proc/cpuinfo.
_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
)
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
_PACKAGES = ("torch", "diffusers", "openvino", "triton", "onnxruntime", "nncf", "torchao", "numpy")


def machine_facts(device: torch.device, threads: int) -> dict[str, Any]:
    """Returns the processor, memory, threads and versions, and the GPU if `device` is one."""
    facts: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": physical_cores(),
        "logical_cores": os.cpu_count(),
        "cpu_flags": cpu_flags(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "platform": platform.platform(),
        "device": str(device),
        "versions": _versions(),
    }
    if device.type == "cuda":
        facts["gpu"] = gpu_facts(device)
    return facts


def cpu_model() -> str:
    """Returns the name of the processor."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """Returns the processor's instruction sets that matter for integer and half-precision arithmetic."""
    words = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return [flag for flag in _FLAGS if flag in words]


def has_fast_bfloat16(device: torch.device) -> bool:
    """Returns whether `device` is a processor with instructions that multiply bfloat16."""
    return device.type == "cpu" and bool(_BFLOAT16_FLAGS & set(cpu_flags()))


def physical_cores() -> int:
    """Returns the number of physical cores that this process may use; hyper-threads of one core count once."""
    allowed = os.sched_getaffinity(0)
    siblings = Path(f"/sys/devices/system/cpu/cpu{next(iter(allowed))}/topology/thread_siblings_list")
    if not siblings.is_file():
        return len(allowed)
    groups = {
        Path(f"/sys/devices/system/cpu/cpu{index}/topology/thread_siblings_list").read_text(encoding="utf-8").strip()
        for index in allowed
    }
    return len(groups)


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """Returns the name, compute capability, memory, driver and CUDA version of a GPU."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": _driver(),
        "cuda": torch.version.cuda,
    }


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"(\d+\.\d+(?:\.\d+)?)", text)
    return match[1] if match else None


def _cpuinfo(key: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    match = re.search(rf"^{key}\s*:\s*(.*)$", text, re.MULTILINE)
    return match[1].strip() if match else ""


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
