"""The kernels of GroupNorm and LayerNorm to int8.

A state is `[rows, channels]` a sample with the channels innermost. Groups are 10 to 80 channels wide, so they start
anywhere in a 16-byte vector: the blocks hold several whole groups, the columns beyond them masked off, and sums over a
group are sums over channels through a one-hot matrix of the few groups in a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from edadm_kernels.launching import await_previous
from edadm_kernels.rounding import CODE_OFFSET, quantize_s8, reciprocal


@triton.jit
def _sum_groups(values, GROUP_CHANNELS: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """Returns sums of `values` `[BLOCK_CHANNELS]` over groups, `[BLOCK_GROUPS]`; the block starts with a group."""
    group_of = tl.arange(0, BLOCK_CHANNELS) // GROUP_CHANNELS
    member = group_of[:, None] == tl.arange(0, BLOCK_GROUPS)[None, :]
    return tl.sum(tl.where(member, values[:, None], 0.0), axis=0)


@triton.jit
def _spread_groups(values, group_of, BLOCK_GROUPS: tl.constexpr):
    """Returns for each channel the entry of `values` `[BLOCK_GROUPS]` at its group, `group_of` `[BLOCK_CHANNELS]`."""
    member = group_of[:, None] == tl.arange(0, BLOCK_GROUPS)[None, :]
    return tl.sum(tl.where(member, values[None, :], 0.0), axis=1)


@triton.jit
def _load_quantizer(scales, zero_points, index: tl.constexpr):
    """Returns the inverse scale and the zero-point of a quantizer.

    Zero-points in float32 are those of signed codes, and come with inverses of the scales.
    """
    scale, zero_point = tl.load(scales + index), tl.load(zero_points + index)
    if zero_points.dtype.element_ty == tl.float32:
        inverse, offset = scale, zero_point.to(tl.int32) + CODE_OFFSET
    else:
        inverse, offset = reciprocal(scale), zero_point
    return inverse, offset


@triton.jit
def _store_codes(
    y, base, offsets, mask, scales, zero_points, out0, out1, out2, QUANT_MAX: tl.constexpr, QUANTIZERS: tl.constexpr
):
    """Stores the codes of `y` at `base + offsets` of one output per quantizer."""
    inverse, zero_point = _load_quantizer(scales, zero_points, 0)
    tl.store(out0 + base + offsets, quantize_s8(y, inverse, zero_point, QUANT_MAX), mask=mask)
    if QUANTIZERS > 1:
        inverse, zero_point = _load_quantizer(scales, zero_points, 1)
        tl.store(out1 + base + offsets, quantize_s8(y, inverse, zero_point, QUANT_MAX), mask=mask)
    if QUANTIZERS > 2:
        inverse, zero_point = _load_quantizer(scales, zero_points, 2)
        tl.store(out2 + base + offsets, quantize_s8(y, inverse, zero_point, QUANT_MAX), mask=mask)


@triton.jit
def group_fused(
    x,
    weight,
    bias,
    scales,
    zero_points,
    out0,
    out1,
    out2,
    rows,
    channels,
    eps,
    QUANT_MAX: tl.constexpr,
    QUANTIZERS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Normalizes and quantizes whole groups of one sample, which stay in registers after the statistics."""
    column = tl.arange(0, BLOCK_CHANNELS)
    channel = tl.program_id(0) * (GROUPS * GROUP_CHANNELS) + column
    channel_mask = (column < GROUPS * GROUP_CHANNELS) & (channel < channels)
    row = tl.arange(0, BLOCK_ROWS)
    mask = (row < rows)[:, None] & channel_mask[None, :]
    base = tl.program_id(1).to(tl.int64) * rows * channels
    offsets = row[:, None] * channels + channel[None, :]
    await_previous(OVERLAP)
    value = tl.load(x + base + offsets, mask=mask, other=0).to(tl.float32)

    group_of = column // GROUP_CHANNELS
    count = rows * GROUP_CHANNELS
    total = _sum_groups(tl.sum(value, axis=0), GROUP_CHANNELS, BLOCK_GROUPS, BLOCK_CHANNELS)
    mean = _spread_groups(total / count, group_of, BLOCK_GROUPS)
    value = tl.where(mask, value - mean[None, :], 0.0)
    squares = _sum_groups(tl.sum(value * value, axis=0), GROUP_CHANNELS, BLOCK_GROUPS, BLOCK_CHANNELS)
    deviation = _spread_groups(tl.rsqrt(squares / count + eps), group_of, BLOCK_GROUPS)

    gain = deviation * tl.load(weight + channel, mask=channel_mask, other=0).to(tl.float32)
    shift = tl.load(bias + channel, mask=channel_mask, other=0).to(tl.float32)
    y = value * gain[None, :] + shift[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    _store_codes(y, base, offsets, mask, scales, zero_points, out0, out1, out2, QUANT_MAX, QUANTIZERS)


@triton.jit
def group_partials(
    x,
    partials,
    rows,
    channels,
    num_chunks,
    rows_per_chunk,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Writes mean and squared deviations of some rows per channel to `partials [samples, num_chunks, 2, channels]`.

    The statistics of a block are computed in registers around the mean of the block and merged with those of the blocks
    before it (Chan et al. 1983).
    """
    chunk = tl.program_id(0)
    sample = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    channel_mask = channel < channels
    start = chunk * rows_per_chunk
    stop = tl.minimum(start + rows_per_chunk, rows)
    source = x + sample * rows * channels + channel

    await_previous(OVERLAP)
    mean = tl.zeros([BLOCK_CHANNELS], dtype=tl.float32)
    deviations = tl.zeros([BLOCK_CHANNELS], dtype=tl.float32)
    for first in range(start, stop, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        mask = (row < stop)[:, None] & channel_mask[None, :]
        value = tl.load(source[None, :] + row[:, None] * channels, mask=mask, other=0).to(tl.float32)
        before = (first - start).to(tl.float32)
        here = tl.minimum(stop - first, BLOCK_ROWS).to(tl.float32)
        block_mean = tl.sum(value, axis=0) / here
        value = tl.where(mask, value - block_mean[None, :], 0.0)
        distance = block_mean - mean
        share = here / (before + here)
        mean += distance * share
        deviations += tl.sum(value * value, axis=0) + distance * distance * before * share

    target = partials + (sample * num_chunks + chunk) * 2 * channels + channel
    tl.store(target, mean, mask=channel_mask)
    tl.store(target + channels, deviations, mask=channel_mask)


@triton.jit
def group_statistics(
    partials,
    weight,
    statistics,
    rows,
    channels,
    num_chunks,
    rows_per_chunk,
    eps,
    CHUNKS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Merges the partial statistics into `statistics [samples, 2, channels]`: the mean of the group, and the gain."""
    sample = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK_CHANNELS)
    channel = tl.program_id(0) * (GROUPS * GROUP_CHANNELS) + column
    channel_mask = (column < GROUPS * GROUP_CHANNELS) & (channel < channels)
    chunk = tl.arange(0, CHUNKS)
    mask = (chunk < num_chunks)[:, None] & channel_mask[None, :]
    partial = partials + sample * num_chunks * 2 * channels + chunk[:, None] * 2 * channels + channel[None, :]
    await_previous(OVERLAP)
    means = tl.load(partial, mask=mask, other=0)
    deviations = tl.load(partial + channels, mask=mask, other=0)

    count = tl.minimum(tl.maximum(rows - chunk * rows_per_chunk, 0), rows_per_chunk).to(tl.float32)[:, None]
    channel_mean = tl.sum(means * count, axis=0) / rows
    between = means - channel_mean[None, :]
    inner = tl.sum(tl.where(mask, deviations + count * between * between, 0.0), axis=0)
    group_of = column // GROUP_CHANNELS
    group_mean = _sum_groups(channel_mean, GROUP_CHANNELS, BLOCK_GROUPS, BLOCK_CHANNELS) / GROUP_CHANNELS
    mean = _spread_groups(group_mean, group_of, BLOCK_GROUPS)
    inner += rows * (channel_mean - mean) * (channel_mean - mean)
    variance = _sum_groups(inner, GROUP_CHANNELS, BLOCK_GROUPS, BLOCK_CHANNELS) / (rows * GROUP_CHANNELS)
    gain = _spread_groups(tl.rsqrt(variance + eps), group_of, BLOCK_GROUPS)
    gain *= tl.load(weight + channel, mask=channel_mask, other=0).to(tl.float32)

    target = statistics + sample * 2 * channels + channel
    tl.store(target, mean, mask=channel_mask)
    tl.store(target + channels, gain, mask=channel_mask)


@triton.jit
def group_apply(
    x,
    statistics,
    bias,
    scales,
    zero_points,
    out0,
    out1,
    out2,
    rows,
    channels,
    QUANT_MAX: tl.constexpr,
    QUANTIZERS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Normalizes and quantizes a block by the statistics of its channels."""
    sample = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    channel_mask = channel < channels
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask = (row < rows)[:, None] & channel_mask[None, :]
    base = sample * rows * channels
    offsets = row[:, None] * channels + channel[None, :]
    await_previous(OVERLAP)
    value = tl.load(x + base + offsets, mask=mask, other=0)
    source = statistics + sample * 2 * channels + channel
    mean = tl.load(source, mask=channel_mask, other=0)
    gain = tl.load(source + channels, mask=channel_mask, other=0)
    shift = tl.load(bias + channel, mask=channel_mask, other=0).to(tl.float32)
    y = (value.to(tl.float32) - mean[None, :]) * gain[None, :] + shift[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    _store_codes(y, base, offsets, mask, scales, zero_points, out0, out1, out2, QUANT_MAX, QUANTIZERS)


@triton.jit
def _normalize_rows(x, starts, row_mask, channels, eps, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Returns two pieces of whole rows of `x`, each minus the mean of its row, and 1 / sqrt(variance + eps).

    The rows begin at `starts` `[BLOCK_ROWS, 1]`, and `row_mask` has the same shape. The pieces are
    `[BLOCK_ROWS, HEAD]` and `[BLOCK_ROWS, TAIL]`, the last is `[BLOCK_ROWS, 1]`. Columns of the tail past the end of
    the row are zero. With `TAIL` 0 the second piece is the first one: Triton 3.6 returns no None.
    """
    head = tl.load(x + (starts + tl.arange(0, HEAD)[None, :]), mask=row_mask, other=0).to(tl.float32)
    total = tl.sum(head, axis=1)
    tail = head
    if TAIL > 0:
        column = HEAD + tl.arange(0, TAIL)
        tail_mask = row_mask & (column < channels)[None, :]
        tail = tl.load(x + (starts + column[None, :]), mask=tail_mask, other=0).to(tl.float32)
        total += tl.sum(tail, axis=1)
    mean = total / channels
    head -= mean[:, None]
    squares = tl.sum(head * head, axis=1)
    if TAIL > 0:
        tail = tl.where(tail_mask, tail - mean[:, None], 0.0)
        squares += tl.sum(tail * tail, axis=1)
    return head, tail, tl.rsqrt(squares / channels + eps)[:, None]


@triton.jit
def layer_rows(
    x,
    weight,
    bias,
    scales,
    zero_points,
    out0,
    out1,
    out2,
    rows,
    channels,
    eps,
    QUANT_MAX: tl.constexpr,
    QUANTIZERS: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Normalizes and quantizes whole rows in registers.

    A row is read as a piece of `HEAD` and a piece of `TAIL` columns; with `TAIL` 0 there is no second piece.
    """
    first = tl.program_id(0) * BLOCK_ROWS
    row = tl.arange(0, BLOCK_ROWS)
    row_mask = (first + row < rows)[:, None]
    base = first.to(tl.int64) * channels
    start = row[:, None] * channels

    column = tl.arange(0, HEAD)
    offsets = start + column[None, :]
    await_previous(OVERLAP)
    head, tail, deviation = _normalize_rows(x + base, start, row_mask, channels, eps, HEAD, TAIL)

    gain = tl.load(weight + column).to(tl.float32)[None, :]
    shift = tl.load(bias + column).to(tl.float32)[None, :]
    y = head * deviation * gain + shift
    _store_codes(y, base, offsets, row_mask, scales, zero_points, out0, out1, out2, QUANT_MAX, QUANTIZERS)
    if TAIL > 0:
        column = HEAD + tl.arange(0, TAIL)
        inside = column < channels
        gain = tl.load(weight + column, mask=inside, other=0).to(tl.float32)[None, :]
        shift = tl.load(bias + column, mask=inside, other=0).to(tl.float32)[None, :]
        y = tail * deviation * gain + shift
        offsets, mask = start + column[None, :], row_mask & inside[None, :]
        _store_codes(y, base, offsets, mask, scales, zero_points, out0, out1, out2, QUANT_MAX, QUANTIZERS)


@triton.jit
def modulated_rows(
    x,
    scale,
    shift,
    inverse_scale,
    code_shift,
    out,
    rows,
    channels,
    rows_per_sample,
    scale_step,
    shift_step,
    eps,
    QUANT_MAX: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Normalizes, modulates and quantizes whole rows in registers; all rows of a program belong to one sample."""
    first = tl.program_id(0) * BLOCK_ROWS
    row = tl.arange(0, BLOCK_ROWS)
    row_mask = (first + row < rows)[:, None]
    start = row[:, None] * channels
    base = first.to(tl.int64) * channels
    sample = first // rows_per_sample

    column = tl.arange(0, HEAD)
    offsets = start + column[None, :]
    await_previous(OVERLAP)
    head, tail, deviation = _normalize_rows(x + base, start, row_mask, channels, eps, HEAD, TAIL)

    inverse, zero_point = tl.load(inverse_scale), tl.load(code_shift).to(tl.int32) + CODE_OFFSET
    scale += sample * scale_step
    shift += sample * shift_step
    gain = 1.0 + tl.load(scale + column).to(tl.float32)[None, :]
    y = head * deviation * gain + tl.load(shift + column).to(tl.float32)[None, :]
    tl.store(out + base + offsets, quantize_s8(y, inverse, zero_point, QUANT_MAX), mask=row_mask)
    if TAIL > 0:
        column = HEAD + tl.arange(0, TAIL)
        inside = column < channels
        gain = 1.0 + tl.load(scale + column, mask=inside, other=0).to(tl.float32)[None, :]
        y = tail * deviation * gain + tl.load(shift + column, mask=inside, other=0).to(tl.float32)[None, :]
        offsets, mask = start + column[None, :], row_mask & inside[None, :]
        tl.store(out + base + offsets, quantize_s8(y, inverse, zero_point, QUANT_MAX), mask=mask)
