"""What tests on a GPU share."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.operands import CUDA


@pytest.fixture
def generator() -> torch.Generator:
    fresh = torch.Generator(CUDA)
    fresh.seed()
    print("seed", fresh.initial_seed())
    return fresh
