r"""What the product kernels want of a layer besides its codes, computed once when it is loaded.

With s = u - 128 the exact sum over the taps inside the input is

    sum (u - z) w = sum s w - (z - 128) sum w

so a layer needs `correction = (z - 128) sum w`, for a convolution once for every set of taps that can fall outside.
"""

from __future__ import annotations

import torch
from torch import Tensor

CODE_OFFSET = 128
W4_BLOCKS = (128, 64)  # codes that are packed together; each half of a block fills at least one int8 MMA (K = 32)

Padding = tuple[int, int, int, int]


def linear_correction(weight: Tensor, zero_point: Tensor | int) -> Tensor:
    """`(zero_point - 128) * sum_k weight[n, k]`, int32 `[N]`.

    Args:
        weight: int8 codes `[N, K]`, unpacked.
        zero_point: One element, convention of the unsigned code.
    """
    return (weight.long().sum(dim=1) * _shift(zero_point, weight)).int()


def border_class_count(padding: Padding) -> int:
    """Rows of `conv_border_table`."""
    top, bottom, left, right = padding
    return (top + 1) * (bottom + 1) * (left + 1) * (right + 1)


def conv_border_table(weight: Tensor, zero_point: Tensor | int, padding: Padding) -> Tensor:
    """Corrections of a convolution, int32 `[classes, O]`: one row for each number of taps outside at each side.

    Row `((t * (bottom + 1) + b) * (left + 1) + l) * (right + 1) + r` is for outputs with t, b, l, r rows or columns of
    taps above, below, left of and right of the input; row 0 is the interior. It holds for every image size and stride.

    Args:
        weight: int8 codes `[O, kh, kw, C]`, unpacked.
        zero_point: One element, convention of the unsigned code.
        padding: Top, bottom, left, right.
    """
    top, bottom, left, right = padding
    taps = weight.long().sum(dim=3)  # [O, kh, kw]
    kh, kw = taps.shape[1:]
    rows = [
        taps[:, t : max(kh - b, 0), x : max(kw - r, 0)].sum(dim=(1, 2))
        for t in range(top + 1)
        for b in range(bottom + 1)
        for x in range(left + 1)
        for r in range(right + 1)
    ]
    return (torch.stack(rows) * _shift(zero_point, weight)).int()


def output_size(size: int, kernel: int, stride: int, before: int, after: int) -> int:
    """Length of a convolution's output along one axis."""
    return (size + before + after - kernel) // stride + 1


def border_classes(size: int, kernel: int, stride: int, before: int, after: int, device: torch.device) -> Tensor:
    """Class of each output along one axis: taps before the input times `after + 1`, plus taps behind it; int64."""
    outputs = torch.arange(output_size(size, kernel, stride, before, after), device=device)
    first = outputs * stride - before
    outside_before = (-first).clamp(0, kernel)
    outside_after = (first + kernel - size).clamp(0, kernel)
    return outside_before * (after + 1) + outside_after


def pack_geglu(rows: Tensor) -> Tensor:
    """Interleave the value half and the gate half of `[2 F, ...]`: weights, scales, corrections and biases alike.

    Row 2j of the result is value j, row 2j + 1 is gate j, so that one thread of the kernel holds both.
    """
    if rows.shape[0] % 2:
        raise ValueError(f"an even number of rows, values then gates, is expected, found {rows.shape[0]}")
    value, gate = rows.chunk(2)
    return torch.stack((value, gate), dim=1).reshape(rows.shape).contiguous()


def w4_block(channels: int) -> int | None:
    """How many codes are packed together; None where no block divides `channels` and codes stay int8."""
    return next((block for block in W4_BLOCKS if channels % block == 0), None)


def pack_w4(codes: Tensor) -> Tensor:
    """Pack signed codes in -8..7 for the in-kernel W4 product: int8 `[..., K]` to uint8 `[..., K / 2]`.

    Split-half in blocks of `w4_block(K)`: byte j of a block holds code j in its low half and code j + block / 2 in its
    high half, so `byte << 4` and `byte & 0xF0` are sixteen times two runs of neighbouring codes.

    Raises:
        ValueError: No block divides K.
    """
    channels = codes.shape[-1]
    block = w4_block(channels)
    if block is None:
        raise ValueError(
            f"a multiple of {W4_BLOCKS[-1]} channels is expected, found {channels}; leave the codes in int8"
        )
    low, high = codes.to(torch.uint8).unflatten(-1, (channels // block, 2, block // 2)).unbind(-2)
    return ((low & 0xF) | (high << 4)).flatten(-2).contiguous()


def unpack_w4(packed: Tensor) -> Tensor:
    """The int8 codes `[..., K]` of `pack_w4`."""
    channels = 2 * packed.shape[-1]
    block = w4_block(channels)
    if block is None:
        raise ValueError(f"packed rows of a multiple of {W4_BLOCKS[-1] // 2} bytes are expected, found {channels // 2}")
    halves = packed.unflatten(-1, (channels // block, 1, block // 2))
    both = torch.cat((halves << 4, halves & 0xF0), dim=-2).flatten(-3)
    return both.view(torch.int8) >> 4


def _shift(zero_point: Tensor | int, weight: Tensor) -> Tensor | int:
    if isinstance(zero_point, Tensor):
        return zero_point.reshape(()).to(weight.device, torch.int64) - CODE_OFFSET
    return zero_point - CODE_OFFSET
