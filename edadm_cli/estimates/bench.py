"""Estimates the cost of a bench from one call of the full-precision denoiser."""

from __future__ import annotations

import time

import torch

from edadm_cli.artifacts import Estimate, RunFolder
from edadm_cli.bench.contenders.registry import require_peers
from edadm_cli.bench.request import resolve
from edadm_cli.config import BenchConfig


def estimate(config: BenchConfig, run_folder: RunFolder) -> Estimate:
    """Estimates time, memory and disk from one call of the full-precision denoiser; nothing is written."""
    request = resolve(config, run_folder)
    require_peers(config.against, request.device)
    denoiser = request.subject.full_precision()
    args, kwargs = request.subject.call(denoiser, config.batch_sizes[0], config.size)
    begun = time.perf_counter()
    with request.in_threads(), torch.no_grad():
        denoiser(*args, **kwargs)
    call = time.perf_counter() - begun
    weights = sum(parameter.nbytes for parameter in denoiser.parameters()) / 2**20
    # parity takes about ten calls per bit width, conversion three; some contenders are as slow as this call, most
    # take half of it
    rows = sum(config.batch_sizes)
    contenders = 4 + len(config.bits)
    seconds = len(config.bits) * 15 * call + 60 + config.rounds * contenders * 0.5 * max(call, 0.2) * rows
    return Estimate(
        seconds=seconds,
        memory_mib=weights * (1 + 0.5 + 0.5 + 1 + 0.5 + 0.3 * len(config.bits)),
        disk_mib=weights * (2 + 0.25 * len(config.bits)),
    )
