"""A small denoiser with quantized layers, and a call of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from edadm_cli.calibrate.nearest import quantize_to_nearest
from edadm_cli.config import BitWidth
from tests.denoisers.families import EVERYWHERE

Call = tuple[tuple[Any, ...], dict[str, Any]]


def call_of(seed: int = 0, rows: int = 1, size: int = 8) -> Call:
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(rows, 4, size, size, generator=generator)
    states = torch.randn(rows, 8, 16, generator=generator)
    return (sample, torch.tensor(5)), {"encoder_hidden_states": states}


@pytest.fixture
def call() -> Call:
    return call_of()


@pytest.fixture
def quantized(denoiser: nn.Module) -> nn.Module:
    """W4A8, split shortcuts, attention products and the edges' inputs quantized too."""
    quantize_to_nearest(denoiser, EVERYWHERE, BitWidth.parse("w4a8"), [call_of(seed) for seed in range(2)])
    return denoiser
