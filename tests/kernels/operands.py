"""Random operands of products, and a stand-in for kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def random(*shape: int, seed: int) -> Tensor:
    """Returns seeded numbers from a normal distribution."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_codes(*shape: int, seed: int, limit: int = 128) -> Tensor:
    """Returns seeded codes from `-limit` to `limit - 1`, int8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-limit, limit, shape, generator=generator).to(torch.int8)


class Grids:
    """Stands for a kernel and remembers the grids of its launches, which compute nothing."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        self.seen.append(grid)
        return lambda *_, **__: None
