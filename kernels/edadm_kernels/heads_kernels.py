"""The kernel that normalizes and rotates heads and writes them into one tensor."""

from __future__ import annotations

import triton
import triton.language as tl

from edadm_kernels.launching import await_previous


@triton.jit
def join_heads_kernel(
    first,
    second,
    first_weight,
    second_weight,
    cos,
    sin,
    out,
    first_length,
    length,
    first_stride,
    second_stride,
    eps,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Writes one token's heads: `WIDTH` channels each, a power of two; `BLOCK` is the next power of two of `HEADS`."""
    token = tl.program_id(0).to(tl.int64)
    sample, place = token // length, token % length
    await_previous(OVERLAP)
    head, channel = tl.arange(0, BLOCK)[:, None], tl.arange(0, WIDTH)[None, :]
    offset, mask = head * WIDTH + channel, head < HEADS
    if place < first_length:
        source, weight = first + (sample * first_length + place) * first_stride, first_weight
    else:
        row = sample * (length - first_length) + place - first_length
        source, weight = second + row * second_stride, second_weight
    x = tl.load(source + offset, mask=mask, other=0).to(tl.float32)
    if NORM:
        inverse = tl.rsqrt(tl.sum(x * x, axis=1) / WIDTH + eps)
        x = x * inverse[:, None] * tl.load(weight + channel).to(tl.float32)
    if ROTATE:
        even, odd = tl.split(tl.reshape(x, (BLOCK, WIDTH // 2, 2)))
        angle = place * WIDTH + tl.arange(0, WIDTH)
        cos_even, cos_odd = tl.split(tl.reshape(tl.load(cos + angle).to(tl.float32), (1, WIDTH // 2, 2)))
        sin_even, sin_odd = tl.split(tl.reshape(tl.load(sin + angle).to(tl.float32), (1, WIDTH // 2, 2)))
        turned = tl.join(even * cos_even - odd * sin_even, odd * cos_odd + even * sin_odd)
        x = tl.reshape(turned, (BLOCK, WIDTH))
    tl.store(out + token * (HEADS * WIDTH) + offset, x, mask=mask)
