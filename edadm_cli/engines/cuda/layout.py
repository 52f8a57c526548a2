"""Images as rows of channels and back: with channels-last strides both are views of the same memory."""

from __future__ import annotations

import torch
from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    """`[N, C, H, W]` with channels-last strides; a copy only where it has others."""
    return x.contiguous(memory_format=torch.channels_last)


def quantizable(x: Tensor) -> Tensor:
    """`x` in an order that the quantizing kernel reads as it stands; some channels of a channels-last image are."""
    if x.ndim != 4:
        return x.contiguous()
    return x if x.stride(1) == 1 else channels_last(x)


def rows_of(image: Tensor) -> Tensor:
    """`[N, C, H, W]` channels last as `[N * H * W, C]`."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def image_of(rows: Tensor, batch: int, height: int, width: int) -> Tensor:
    """`[N * H * W, C]` as `[N, C, H, W]` with channels-last strides."""
    return rows.view(batch, height, width, rows.shape[-1]).permute(0, 3, 1, 2)
