"""Contenders that need no process and no GPU, for tests of the bench."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from edadm_cli.artifacts import Contender, Latency
from edadm_cli.bench.contenders.base import DenoiserFacts, Preparation
from edadm_cli.bench.spec import Call, ContenderEnvironment

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


ALONE, TOGETHER = (
    ContenderEnvironment("cpu", 1, None, is_alone=True),
    ContenderEnvironment("cpu", 1, None, is_alone=False),
)


def call_of(seed: int = 0) -> Call:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(1, 8, 16, generator=generator)
    return (torch.randn(1, 4, 8, 8, generator=generator), torch.tensor(5)), {"encoder_hidden_states": states}


def preparation(
    denoiser: nn.Module, folder: Path, device: torch.device, half: str | None, compiled: bool = False
) -> Preparation:
    return Preparation(
        facts=DenoiserFacts.of(denoiser),
        denoiser_folder=folder / "float",
        scratch=folder,
        calls=[call_of(seed) for seed in range(2)],
        environment=replace(TOGETHER, device=str(device)),
        dtype=half or "float32",
        half=half,
        compiled=compiled,
    )


def result(name: str, median: float, bits: str | None = None, engine: str = "torch") -> Contender:
    return Contender(
        name=name,
        engine=engine,
        dtype="float32",
        bits=bits,
        compiled=False,
        latency_ms=Latency(median=median, min=median, max=median, num_samples=1),
        peak_memory_mib=None,
        load_memory_mib=None,
        load_seconds=1.0,
        size_mib=1.0,
        throughput={"1": 1000 / median},
    )


class Clock:
    """A contender whose calls take a given time."""

    def __init__(self, log: list[str], name: str, call_ms: float) -> None:
        self.log, self.name, self.call_ms = log, name, call_ms

    def warm_up(self, batch_size: int) -> float:
        return self.call_ms

    def time(self, batch_size: int, count: int) -> list[float]:
        self.log.append(self.name)
        return [100.0, *[self.call_ms] * (count - 1)] if count > 1 else [self.call_ms]
