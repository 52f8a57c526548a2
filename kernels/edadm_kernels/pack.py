r"""Computes what the product kernels need of a layer besides its codes, once when the layer is loaded.

With stored codes s = u - 128, the exact sum over the taps inside the input is

    sum (u - z) w = sum s w - (z - 128) sum w

so a layer needs `correction = (z - 128) sum w`; a convolution needs one per set of taps that can be outside the input.
"""

from __future__ import annotations

import torch
from torch import Tensor

CODE_OFFSET = 128
W4_BLOCKS = (128, 64)  # numbers of codes that are packed together; each half of a block fills an int8 MMA (K = 32)

Padding = tuple[int, int, int, int]


def linear_correction(weight: Tensor, zero_point: Tensor | int) -> Tensor:
    """Returns `(zero_point - 128) * sum_k weight[n, k]`, int32 `[N]`.

    Args:
        weight: int8 codes `[N, K]`, unpacked.
        zero_point: The zero-point of the input in the convention of unsigned codes, one element.
    """
    return (weight.long().sum(dim=1) * _shift(zero_point, weight)).int()


def border_class_count(padding: Padding) -> int:
    """Returns the number of rows of `conv_border_table`."""
    top, bottom, left, right = padding
    return (top + 1) * (bottom + 1) * (left + 1) * (right + 1)


def conv_border_table(weight: Tensor, zero_point: Tensor | int, padding: Padding) -> Tensor:
    """Returns the corrections of a convolution, int32 `[classes, O]`: one row per number of outside taps at each side.

    Row `((t * (bottom + 1) + b) * (left + 1) + l) * (right + 1) + r` is for outputs with t, b, l and r rows or columns
    of taps above, below, left of and right of the input; row 0 is the interior. The table is valid for every image size
    and stride.

    Args:
        weight: int8 codes `[O, kh, kw, C]`, unpacked.
        zero_point: The zero-point of the input in the convention of unsigned codes, one element.
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
    """Returns the length of a convolution's output along one axis."""
    return (size + before + after - kernel) // stride + 1


def border_classes(size: int, kernel: int, stride: int, before: int, after: int, device: torch.device) -> Tensor:
    """Returns the class of each output along one axis: taps before the input times `after + 1`, plus taps after it."""
    outputs = torch.arange(output_size(size, kernel, stride, before, after), device=device)
    first = outputs * stride - before
    outside_before = (-first).clamp(0, kernel)
    outside_after = (first + kernel - size).clamp(0, kernel)
    return outside_before * (after + 1) + outside_after


def pack_geglu(rows: Tensor) -> Tensor:
    """Interleaves the value half and the gate half of `[2 F, ...]`: of weights, scales, corrections or biases.

    Row 2j of the result is value j and row 2j + 1 is gate j, so that one thread of the kernel has both.
    """
    if rows.shape[0] % 2:
        raise ValueError(f"an even number of rows, first values and then gates, is expected, found {rows.shape[0]}")
    value, gate = rows.chunk(2)
    return torch.stack((value, gate), dim=1).reshape(rows.shape).contiguous()


def w4_block(channels: int) -> int | None:
    """Returns how many codes are packed together; `None` if no block divides `channels`, so that codes stay int8."""
    return next((block for block in W4_BLOCKS if channels % block == 0), None)


def pack_w4(codes: Tensor) -> Tensor:
    """Packs signed codes of -8 to 7, int8 `[..., K]`, for the kernels: two codes per byte, uint8 `[..., K / 2]`.

    In a block of `w4_block(K)` codes, byte j has code j in its low half and code j + block / 2 in its high half. So
    `byte << 4` and `byte & 0xF0` are sixteen times two runs of neighbouring codes.

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
    """Returns the int8 codes `[..., K]` from which `pack_w4` made `packed`."""
    channels = 2 * packed.shape[-1]
    block = w4_block(channels)
    if block is None:
        raise ValueError(f"packed rows of a multiple of {W4_BLOCKS[-1] // 2} bytes are expected, found {channels // 2}")
    halves = packed.unflatten(-1, (channels // block, 1, block // 2))
    both = torch.cat((halves << 4, halves & 0xF0), dim=-2).flatten(-3)
    return both.view(torch.int8) >> 4


def _shift(zero_point: Tensor | int, weight: Tensor) -> Tensor | int:
    """Returns the zero-point in the convention of signed codes."""
    if isinstance(zero_point, Tensor):
        return zero_point.reshape(()).to(weight.device, torch.int64) - CODE_OFFSET
    return zero_point - CODE_OFFSET
