"""Kernels that quantize the operands of attention to 8-bit codes."""

from __future__ import annotations

import triton
import triton.language as tl

from edadm_kernels.launching import await_previous
from edadm_kernels.rounding import MAGIC, reciprocal


@triton.jit
def _nonzero(x):
    """Returns `x`, or the smallest scale where a block has only zeros."""
    return tl.maximum(x, 1e-20)


@triton.jit
def _codes(x, inverse):
    """Returns codes from -127 to 127, rounded to nearest even."""
    scaled = tl.minimum(tl.maximum(x * inverse, -127.0), 127.0)
    return (scaled + MAGIC).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def extremes_kernel(
    k,
    v,
    out,
    keys,
    heads,
    chunks,
    k_sample,
    k_head,
    k_token,
    v_sample,
    v_head,
    v_token,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Writes the extremes of each channel of `CHUNK` tokens to `out [2, N * heads, chunks, 2, WIDTH]`.

    A program reads one chunk of one head, of keys (`program_id(2) == 0`) or of values.
    """
    sample = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    is_values = tl.program_id(2)
    channels = tl.arange(0, PADDED)
    inside = channels < WIDTH
    if is_values == 0:
        x = k + sample * k_sample + head * k_head
        step = k_token
    else:
        x = v + sample * v_sample + head * v_head
        step = v_token
    low = tl.full((TOKENS, PADDED), float("inf"), tl.float32)
    high = tl.full((TOKENS, PADDED), float("-inf"), tl.float32)
    first = tl.program_id(0) * CHUNK
    await_previous(OVERLAP)
    for start in range(0, CHUNK, TOKENS):
        tokens = tl.minimum(
            first + start + tl.arange(0, TOKENS), keys - 1
        )  # reading the last token again changes nothing
        here = tl.load(x + tokens[:, None] * step + channels[None, :], mask=inside[None, :], other=0).to(tl.float32)
        low = tl.minimum(low, here)
        high = tl.maximum(high, here)
    at = out + ((is_values * tl.num_programs(1) + tl.program_id(1)) * chunks + tl.program_id(0)) * (2 * WIDTH)
    tl.store(at + channels, tl.min(low, axis=0), mask=inside)
    tl.store(at + WIDTH + channels, tl.max(high, axis=0), mask=inside)


@triton.jit
def codes_kernel(
    q,
    k,
    v,
    extremes,
    q_codes,
    k_codes,
    v_codes,
    q_scale,
    k_scale,
    v_scale,
    v_center,
    queries,
    keys,
    heads,
    chunks,
    query_blocks,
    key_blocks,
    slots,
    q_sample,
    q_head,
    q_token,
    k_sample,
    k_head,
    k_token,
    v_sample,
    v_head,
    v_token,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROW: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNKS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Writes the codes of `TOKENS` tokens of one head: of queries, then keys, then values by `program_id(0)`.

    Queries have one scale per token, `[N, heads, queries]`. Keys are centered between the extremes of each channel and
    have one scale per block, `[N, heads, key_blocks]`. Values have one scale and one center per channel,
    `[N, heads, WIDTH]`. `q_codes` has the shape `[N, queries, heads, ROW]`, `k_codes` `[N, keys, heads, ROW]` and
    `v_codes` `[N, heads, WIDTH, slots]`, with keys in the order of `reference.attention.keys_of`.
    """
    sample = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    channels = tl.arange(0, PADDED)
    inside = channels < WIDTH
    block = tl.program_id(0)
    await_previous(OVERLAP)
    if block < query_blocks:
        tokens = block * TOKENS + tl.arange(0, TOKENS)
        mask = (tokens < queries)[:, None] & inside[None, :]
        at = q + sample * q_sample + head * q_head + tokens[:, None] * q_token + channels[None, :]
        x = tl.load(at, mask=mask, other=0).to(tl.float32)
        scale = _nonzero(tl.max(tl.abs(x), axis=1) * (1 / 127))
        rows = (sample * queries + tokens) * heads + head
        tl.store(q_codes + rows[:, None] * ROW + channels[None, :], _codes(x, reciprocal(scale)[:, None]), mask=mask)
        tl.store(q_scale + tl.program_id(1) * queries + tokens, scale, mask=tokens < queries)
    else:
        is_values = block >= query_blocks + key_blocks
        first = tl.where(is_values, block - key_blocks, block) - query_blocks
        pieces = tl.arange(0, CHUNKS)
        part = tl.where(is_values, tl.num_programs(1), 0) + tl.program_id(1)
        limits = extremes + (part * chunks + pieces[:, None]) * (2 * WIDTH) + channels[None, :]
        present = (pieces < chunks)[:, None] & inside[None, :]
        low = tl.min(tl.load(limits, mask=present, other=float("inf")), axis=0)
        high = tl.max(tl.load(limits + WIDTH, mask=present, other=float("-inf")), axis=0)
        center = tl.where(inside, (low + high) * 0.5, 0.0)
        if is_values:
            slot = tl.arange(0, TOKENS)
            key = first * TOKENS + slot // 16 * 16 + slot // 2 % 2 * 8 + slot // 4 % 4 * 2 + slot % 2
            step = _nonzero(tl.where(inside, (high - low) * (0.5 / 127), 1.0))
            counts = (key < keys)[:, None] & inside[None, :]
            value_at = v + sample * v_sample + head * v_head + key[:, None] * v_token + channels[None, :]
            values = tl.load(value_at, mask=counts, other=0).to(tl.float32) - center[None, :]
            codes = tl.where(counts, _codes(values, reciprocal(step)[None, :]), 0)
            places = first * TOKENS + slot
            to = v_codes + (tl.program_id(1).to(tl.int64) * WIDTH + channels[:, None]) * slots + places[None, :]
            tl.store(to, tl.trans(codes), mask=inside[:, None] & (places < slots)[None, :])
            if first == 0:
                tl.store(v_scale + tl.program_id(1) * WIDTH + channels, step, mask=inside)
                tl.store(v_center + tl.program_id(1) * WIDTH + channels, center, mask=inside)
        else:
            places = first * TOKENS + tl.arange(0, TOKENS)
            counts = (places < keys)[:, None] & inside[None, :]
            key_at = k + sample * k_sample + head * k_head + places[:, None] * k_token + channels[None, :]
            centered = tl.where(counts, tl.load(key_at, mask=counts, other=0).to(tl.float32) - center[None, :], 0.0)
            size = _nonzero(tl.max(tl.max(tl.abs(centered), axis=1), axis=0) * (1 / 127))
            at_row = (sample * keys + places) * heads + head
            key_to = k_codes + at_row[:, None] * ROW + channels[None, :]
            tl.store(key_to, _codes(centered, reciprocal(size)), mask=counts)
            tl.store(k_scale + tl.program_id(1) * key_blocks + first, size)


@triton.jit
def _grid_codes(x, inverse, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Returns codes of a signed grid, rounded to nearest even."""
    scaled = tl.minimum(tl.maximum(x * inverse, LOW), HIGH)
    return (scaled + MAGIC).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def grid_codes_kernel(
    q,
    k,
    v,
    q_codes,
    k_codes,
    v_codes,
    q_scale,
    k_scale,
    v_scale,
    queries,
    keys,
    heads,
    query_blocks,
    key_blocks,
    slots,
    q_sample,
    q_head,
    q_token,
    k_sample,
    k_head,
    k_token,
    v_sample,
    v_head,
    v_token,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROW: tl.constexpr,
    TOKENS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Writes what `codes_kernel` writes, but on the grids of the model: each of the scales has one element."""
    sample = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    channels = tl.arange(0, PADDED)
    inside = channels < WIDTH
    block = tl.program_id(0)
    await_previous(OVERLAP)
    if block < query_blocks:
        tokens = block * TOKENS + tl.arange(0, TOKENS)
        mask = (tokens < queries)[:, None] & inside[None, :]
        at = q + sample * q_sample + head * q_head + tokens[:, None] * q_token + channels[None, :]
        x = tl.load(at, mask=mask, other=0).to(tl.float32)
        rows = (sample * queries + tokens) * heads + head
        codes = _grid_codes(x, reciprocal(tl.load(q_scale)), LOW, HIGH)
        tl.store(q_codes + rows[:, None] * ROW + channels[None, :], codes, mask=mask)
    elif block < query_blocks + key_blocks:
        places = (block - query_blocks) * TOKENS + tl.arange(0, TOKENS)
        counts = (places < keys)[:, None] & inside[None, :]
        key_at = k + sample * k_sample + head * k_head + places[:, None] * k_token + channels[None, :]
        values = tl.load(key_at, mask=counts, other=0).to(tl.float32)
        at_row = (sample * keys + places) * heads + head
        key_codes = _grid_codes(values, reciprocal(tl.load(k_scale)), LOW, HIGH)
        tl.store(k_codes + at_row[:, None] * ROW + channels[None, :], key_codes, mask=counts)
    else:
        slot = (block - query_blocks - key_blocks) * TOKENS + tl.arange(0, TOKENS)
        key = slot // 16 * 16 + slot // 2 % 2 * 8 + slot // 4 % 4 * 2 + slot % 2
        present = (key < keys)[:, None] & inside[None, :]
        value_at = v + sample * v_sample + head * v_head + key[:, None] * v_token + channels[None, :]
        value = tl.load(value_at, mask=present, other=0).to(tl.float32)
        value_codes = tl.where(present, _grid_codes(value, reciprocal(tl.load(v_scale)), LOW, HIGH), 0)
        to = v_codes + (tl.program_id(1).to(tl.int64) * WIDTH + channels[:, None]) * slots + slot[None, :]
        tl.store(to, tl.trans(value_codes), mask=inside[:, None] & (slot < slots)[None, :])
