"""Random values for the example call of a denoiser."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_DEFAULT_SIZE = 128


class ExampleValues:
    """Makes the tensors of one example call, on the denoiser's device and in its element type.

    Args:
        denoiser: A denoiser of diffusers.
        rows: The number of rows: images times guidance branches.
        seed: The seed of the values.
        size: The height and width of the latents, or of the pixels for a model without an autoencoder. `None` stands
            for the model's `sample_size`.
    """

    TIMESTEP = 500
    CLIP_TOKENS = 77

    def __init__(self, denoiser: nn.Module, rows: int, seed: int, size: tuple[int, int] | None) -> None:
        first = next(p for p in denoiser.parameters() if p.is_floating_point())
        self.device, self.dtype, self.rows = first.device, first.dtype, rows
        self.config: Any = denoiser.config
        self.generator = torch.Generator().manual_seed(seed)
        model_size = getattr(self.config, "sample_size", None) or _DEFAULT_SIZE
        self.size = size or (model_size, model_size)

    def normal(self, *shape: int) -> Tensor:
        """Returns standard normal values with shape `(rows, *shape)`."""
        values = torch.randn((self.rows, *shape), generator=self.generator)
        return values.to(self.device, self.dtype)

    def latents(self) -> Tensor:
        """Returns a noisy sample with shape `(rows, in_channels, height, width)`."""
        return self.normal(self.config.in_channels, *self.size)

    def labels(self, count: int) -> Tensor:
        """Returns one of `count` class labels per row."""
        return torch.randint(count, (self.rows,), generator=self.generator).to(self.device)

    def timestep(self, value: float = TIMESTEP) -> Tensor:
        """Returns one timestep per row, as transformers expect it."""
        return torch.full((self.rows,), value, device=self.device)

    def scalar_timestep(self) -> Tensor:
        """Returns one timestep for all rows, as UNets expect it."""
        return torch.tensor(self.TIMESTEP, device=self.device)
