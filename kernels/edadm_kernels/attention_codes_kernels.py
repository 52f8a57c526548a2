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
def _codes(x, inverse, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Returns codes from LOW to HIGH of a signed grid, rounded to nearest even."""
    scaled = tl.minimum(tl.maximum(x * inverse, LOW), HIGH)
    return (scaled + MAGIC).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _load_tokens(x, sample, head, tokens, sample_step, head_step, token_step, channels, mask):
    """Returns `tokens` of one head of `x` as float32 `[TOKENS, PADDED]`; zeros where `mask` is false."""
    at = x + sample * sample_step + head * head_step + tokens[:, None] * token_step + channels[None, :]
    return tl.load(at, mask=mask, other=0).to(tl.float32)


@triton.jit
def _places(out, rows, channels, ROW: tl.constexpr):
    """Returns the addresses of codes `[TOKENS, PADDED]` in `out`, whose rows of `ROW` bytes are one token and head."""
    return out + rows[:, None] * ROW + channels[None, :]


@triton.jit
def _keys_of(start, place):
    """Returns the keys whose values are at slots `start + place`; see `reference.attention.keys_of`."""
    return start + place // 16 * 16 + place // 2 % 2 * 8 + place // 4 % 4 * 2 + place % 2


@triton.jit
def _store_slots(codes, out, places, slots, channels, inside, WIDTH: tl.constexpr):
    """Stores codes `[TOKENS, PADDED]` at slots `places` of one head of `out` `[N, heads, WIDTH, slots]`."""
    to = out + (tl.program_id(1).to(tl.int64) * WIDTH + channels[:, None]) * slots + places[None, :]
    tl.store(to, tl.trans(codes), mask=inside[:, None] & (places < slots)[None, :])


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
def _load_extremes(extremes, is_values, chunks, channels, inside, WIDTH: tl.constexpr, CHUNKS: tl.constexpr):
    """Returns the least and the largest value of each channel of one head of keys or values, `[PADDED]`.

    `extremes` has the shape `[2, N * heads, chunks, 2, WIDTH]`, as `extremes_kernel` writes it.
    """
    pieces = tl.arange(0, CHUNKS)
    part = tl.where(is_values, tl.num_programs(1), 0) + tl.program_id(1)
    limits = extremes + (part * chunks + pieces[:, None]) * (2 * WIDTH) + channels[None, :]
    present = (pieces < chunks)[:, None] & inside[None, :]
    low = tl.min(tl.load(limits, mask=present, other=float("inf")), axis=0)
    high = tl.max(tl.load(limits + WIDTH, mask=present, other=float("-inf")), axis=0)
    return low, high


@triton.jit
def _write_queries(
    q, q_codes, q_scale, block, queries, sample_step, head_step, token_step, sample, head, heads, channels, inside,
    ROW: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Writes the codes of a block of queries of one head, and one scale per query."""
    tokens = block * TOKENS + tl.arange(0, TOKENS)
    mask = (tokens < queries)[:, None] & inside[None, :]
    x = _load_tokens(q, sample, head, tokens, sample_step, head_step, token_step, channels, mask)
    scale = _nonzero(tl.max(tl.abs(x), axis=1) * (1 / 127))
    rows = (sample * queries + tokens) * heads + head
    codes_at = _places(q_codes, rows, channels, ROW)
    tl.store(codes_at, _codes(x, reciprocal(scale)[:, None], -127.0, 127.0), mask=mask)
    tl.store(q_scale + tl.program_id(1) * queries + tokens, scale, mask=tokens < queries)


@triton.jit
def _write_keys(
    k, k_codes, k_scale, center, block, keys, key_blocks, sample_step, head_step, token_step, sample, head, heads,
    channels, inside, ROW: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Writes the codes of a block of keys of one head minus `center` `[PADDED]`, and the scale of the block."""
    tokens = block * TOKENS + tl.arange(0, TOKENS)
    mask = (tokens < keys)[:, None] & inside[None, :]
    x = _load_tokens(k, sample, head, tokens, sample_step, head_step, token_step, channels, mask)
    centered = tl.where(mask, x - center[None, :], 0.0)
    scale = _nonzero(tl.max(tl.max(tl.abs(centered), axis=1), axis=0) * (1 / 127))
    rows = (sample * keys + tokens) * heads + head
    codes_at = _places(k_codes, rows, channels, ROW)
    tl.store(codes_at, _codes(centered, reciprocal(scale), -127.0, 127.0), mask=mask)
    tl.store(k_scale + tl.program_id(1) * key_blocks + block, scale)


@triton.jit
def _write_values(
    v, v_codes, v_scale, v_center, low, high, center, block, keys, slots, sample_step, head_step, token_step,
    sample, head, channels, inside, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Writes the codes of a block of values of one head; the first block also writes scales and centers.

    `low`, `high` and `center` are the extremes of each channel and the middle between them, `[PADDED]`.
    """
    place = tl.arange(0, TOKENS)
    tokens = _keys_of(block * TOKENS, place)
    scale = _nonzero(tl.where(inside, (high - low) * (0.5 / 127), 1.0))
    mask = (tokens < keys)[:, None] & inside[None, :]
    x = _load_tokens(v, sample, head, tokens, sample_step, head_step, token_step, channels, mask)
    centered = x - center[None, :]
    codes = tl.where(mask, _codes(centered, reciprocal(scale)[None, :], -127.0, 127.0), 0)
    _store_slots(codes, v_codes, block * TOKENS + place, slots, channels, inside, WIDTH)
    if block == 0:
        tl.store(v_scale + tl.program_id(1) * WIDTH + channels, scale, mask=inside)
        tl.store(v_center + tl.program_id(1) * WIDTH + channels, center, mask=inside)


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
        _write_queries(
            q, q_codes, q_scale, block, queries, q_sample, q_head, q_token, sample, head, heads, channels, inside,
            ROW, TOKENS,
        )  # fmt: skip
    else:
        is_values = block >= query_blocks + key_blocks
        first = tl.where(is_values, block - key_blocks, block) - query_blocks
        low, high = _load_extremes(extremes, is_values, chunks, channels, inside, WIDTH, CHUNKS)
        center = tl.where(inside, (low + high) * 0.5, 0.0)
        if is_values:
            _write_values(
                v, v_codes, v_scale, v_center, low, high, center, first, keys, slots, v_sample, v_head, v_token,
                sample, head, channels, inside, WIDTH, TOKENS,
            )  # fmt: skip
        else:
            _write_keys(
                k, k_codes, k_scale, center, first, keys, key_blocks, k_sample, k_head, k_token, sample, head, heads,
                channels, inside, ROW, TOKENS,
            )  # fmt: skip


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
        x = _load_tokens(q, sample, head, tokens, q_sample, q_head, q_token, channels, mask)
        rows = (sample * queries + tokens) * heads + head
        codes = _codes(x, reciprocal(tl.load(q_scale)), LOW, HIGH)
        tl.store(_places(q_codes, rows, channels, ROW), codes, mask=mask)
    elif block < query_blocks + key_blocks:
        tokens = (block - query_blocks) * TOKENS + tl.arange(0, TOKENS)
        mask = (tokens < keys)[:, None] & inside[None, :]
        x = _load_tokens(k, sample, head, tokens, k_sample, k_head, k_token, channels, mask)
        rows = (sample * keys + tokens) * heads + head
        codes = _codes(x, reciprocal(tl.load(k_scale)), LOW, HIGH)
        tl.store(_places(k_codes, rows, channels, ROW), codes, mask=mask)
    else:
        places = (block - query_blocks - key_blocks) * TOKENS + tl.arange(0, TOKENS)
        tokens = _keys_of(0, places)
        mask = (tokens < keys)[:, None] & inside[None, :]
        x = _load_tokens(v, sample, head, tokens, v_sample, v_head, v_token, channels, mask)
        codes = tl.where(mask, _codes(x, reciprocal(tl.load(v_scale)), LOW, HIGH), 0)
        _store_slots(codes, v_codes, places, slots, channels, inside, WIDTH)
