"""Random operands of products."""

from __future__ import annotations

import torch
from torch import Tensor


def random(*shape: int, seed: int) -> Tensor:
    """Returns seeded numbers from a normal distribution."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_codes(*shape: int, seed: int, limit: int = 128) -> Tensor:
    """Returns seeded codes from `-limit` to `limit - 1`, int8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-limit, limit, shape, generator=generator).to(torch.int8)
