"""Random operands of products on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

CUDA = torch.device("cuda")


def codes(shape: tuple[int, ...], generator: torch.Generator, limit: int = 128) -> Tensor:
    return torch.randint(-limit, limit, shape, generator=generator, device=CUDA, dtype=torch.int8)


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=CUDA)


def poison(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Leave a block of this size full of nonsense where the allocator will take the output from."""
    torch.full(shape, 99 if dtype == torch.int8 else float("nan"), dtype=dtype, device=CUDA)


def epilogue(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.rand(n, generator=generator, device=CUDA) * 1e-4, normal((n,), generator).half()
