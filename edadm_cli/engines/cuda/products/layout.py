"""Converts images to rows of channels and back. With channels-last strides, both are views of the same memory."""

from __future__ import annotations

import torch
from torch import Tensor

import edadm_kernels as kernels


def channels_last(x: Tensor) -> Tensor:
    """Returns `x` `[N, C, H, W]` with channels-last strides; it is a copy only if `x` has other strides."""
    return x.contiguous(memory_format=torch.channels_last)


def quantizable(x: Tensor) -> Tensor:
    """Returns `x` with strides that the quantizing kernel can read, as a copy only if necessary.

    The kernel can read a range of channels of a channels-last image without a copy, but not a range of its rows or
    columns.
    """
    if x.ndim != 4:
        return x.contiguous()
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x if x.stride(1) == 1 and kernels.has_even_rows(x) else channels_last(x)


def rows_of(image: Tensor) -> Tensor:
    """Returns a channels-last image `[N, C, H, W]` as rows `[N * H * W, C]`."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def image_of(rows: Tensor, batch: int, height: int, width: int) -> Tensor:
    """Returns rows `[N * H * W, C]` as an image `[N, C, H, W]` with channels-last strides."""
    return rows.view(batch, height, width, rows.shape[-1]).permute(0, 3, 1, 2)
