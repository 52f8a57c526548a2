"""A layer with a concatenated input, whose channel ranges are quantized one by one."""

from __future__ import annotations

from torch import Tensor, nn


class SplitLayer(nn.Module):
    """A layer with a concatenated input: each channel range has its own quantizers, and the products are summed.

    Args:
        parts: The layers of the channel ranges, in order.
        sizes: The number of input channels of each part.
        channel_dim: The dimension of the input's channels, 1 or -1.

    References:
        Q-Diffusion, arXiv 2302.04304, section 4.3 (split shortcut quantization).
    """

    def __init__(self, parts: list[nn.Module], sizes: tuple[int, ...], channel_dim: int) -> None:
        super().__init__()
        for index, part in enumerate(parts):
            self.add_module(f"part{index}", part)
        self.sizes, self.channel_dim = tuple(sizes), channel_dim

    @property
    def parts(self) -> list[nn.Module]:
        """The layers of the channel ranges, in order."""
        return [getattr(self, f"part{index}") for index in range(len(self.sizes))]

    def forward(self, x: Tensor) -> Tensor:
        """Returns the sum of the products of the channel ranges."""
        pieces = x.split(self.sizes, dim=self.channel_dim)
        first, *rest = (part(piece) for part, piece in zip(self.parts, pieces, strict=True))
        total: Tensor = first
        for product in rest:
            total = total + product
        return total
