"""Resolves the configuration of a bench: everything that it leaves open is decided here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from edadm_cli.artifacts import RunFolder
from edadm_cli.bench.machine import has_fast_bfloat16, physical_cores
from edadm_cli.bench.spec import ContenderEnvironment
from edadm_cli.bench.subject import Subject, subject_of
from edadm_cli.config import BenchConfig
from edadm_cli.engines.base import Engine
from edadm_cli.engines.registry import default_engine
from edadm_cli.engines.registry import engine as engine_of
from edadm_cli.errors import MachineError, UsageError
from edadm_cli.integrations.cache_settings import StepCache
from edadm_cli.models.loading import resolve_device

_AUTOTUNED = "max-autotune-no-cudagraphs"  # graphs are recorded by the bench, for all contenders alike


@dataclass(frozen=True)
class BenchRequest:
    """A bench whose settings are all decided.

    Attributes:
        config: The configuration.
        run: The run folder.
        device: The device of the contenders.
        engine: The engine of the quantized denoiser.
        subject: The denoiser that is measured.
        dtype: Name of the element type of what is not quantized.
        half: Name of the half-precision type of the full-precision contenders; `None` if the device has no fast one.
        threads: CPU threads.
    """

    config: BenchConfig
    run: RunFolder
    device: torch.device
    engine: Engine
    subject: Subject
    dtype: str
    half: str | None
    threads: int

    @property
    def name(self) -> str:
        """Returns the artifact's name."""
        return name_of(self.config, self.engine, self.device)

    @property
    def environment(self) -> ContenderEnvironment:
        """Returns the device and the threads of the contenders; on a CPU each has a process of its own."""
        mode = _AUTOTUNED if self.config.autotune else None
        return ContenderEnvironment(str(self.device), self.threads, mode, is_alone=self.device.type != "cuda")

    @contextmanager
    def in_threads(self) -> Iterator[None]:
        """Returns a context in which torch computes with the threads of the request in this process."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def identity_fields(self) -> dict[str, Any]:
        """Returns the settings that decide the result, as resolved, without facts about the machine."""
        fields = self.config.identity_fields()
        fields |= {"engine": self.engine.name, "dtype": self.dtype, "device": self.device.type, "threads": self.threads}
        return fields


def name_of(config: BenchConfig, engine: Engine, device: torch.device) -> str:
    """Returns the name of an artifact that holds such a measurement: `w8a8-w4a8-openvino-cpu`."""
    bits = "-".join(str(width) for width in config.bits)
    return f"{bits}-{engine.name}-{device.type}"


def settle_engine(config: BenchConfig) -> tuple[torch.device, Engine]:
    """Returns the device and the engine, which is the device's own where the configuration names none.

    Raises:
        MachineError: There is no such device.
        UsageError: There is no such engine.
    """
    device = resolve_device(config.device)
    return device, default_engine(device) if config.engine is None else engine_of(config.engine)


def resolve(config: BenchConfig, run: RunFolder) -> BenchRequest:
    """Decides everything that a configuration leaves open, and checks it.

    Raises:
        MachineError: There is no such device, the engine cannot run on it, or the threads exceed the cores.
        UsageError: There is no such engine, or whole images are to be timed with one of several denoisers.
        InputError: There is no such export or model.
    """
    device, engine = settle_engine(config)
    cores = os.cpu_count() or 1
    if config.threads is not None and config.threads > cores:
        raise MachineError(f"--threads {config.threads} is more than the {cores} logical cores of this machine.")
    if config.cache is not None:
        StepCache.parse(config.cache)
        if not config.pipeline:
            raise UsageError("--cache saves time over several steps of an image, so it needs --pipeline.")
    engine.require(device)
    engine.require_attention(config.attention)
    subject = subject_of(config, run, device)
    if config.pipeline:
        subject.require_whole_pipeline()
    half = "float16" if device.type == "cuda" else "bfloat16" if has_fast_bfloat16(device) else None
    return BenchRequest(
        config=config,
        run=run,
        device=device,
        engine=engine,
        subject=subject,
        dtype=config.dtype or half or "float32",
        half=half,
        threads=config.threads or physical_cores(),
    )
