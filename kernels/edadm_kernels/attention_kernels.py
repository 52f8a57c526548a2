"""The kernel of attention with int8 codes as its result: scores, softmax and the sum of values in one pass."""

from __future__ import annotations

import triton
import triton.language as tl

from edadm_kernels.launching import await_previous
from edadm_kernels.rounding import quantize_s8, reciprocal


@triton.jit
def _add_to_softmax(scores, largest, total):
    """Adds the scores of `BN` more keys to a softmax that is computed block by block (Milakov & Gimelshein 2018).

    Args:
        scores: float32 `[BM, BN]`, in units whose exponential is a power of two.
        largest: The largest score of each query so far, `[BM]`.
        total: The sum of the weights of each query so far, `[BM]`.

    Returns:
        The weights of these keys `[BM, BN]`, the factor `[BM]` of everything that was summed before, and the new
        `largest` and `total`. All weights are relative to the largest score so far.
    """
    higher = tl.maximum(largest, tl.max(scores, axis=1))
    weights = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(largest - higher)
    return weights, shrink, higher, total * shrink + tl.sum(weights, axis=1)


@triton.jit
def _store(y, out, rows, row_mask, columns, column_mask, width, inverse, zero_point, QUANT_MAX: tl.constexpr):
    """Stores the codes of `y` `[BM, columns]` at `rows` and `columns` of `out` `[*, width]`."""
    mask = row_mask[:, None] & column_mask[None, :]
    codes = quantize_s8(y.to(tl.float32), inverse, zero_point, QUANT_MAX)
    tl.store(out + rows[:, None] * width + columns[None, :], codes, mask=mask)


@triton.jit
def attention_kernel(
    q,
    k,
    v,
    out_scale,
    out_zero_point,
    out,
    queries,
    keys,
    q_stride,
    k_stride,
    v_stride,
    scale,
    QUANT_MAX: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Computes attention for `BM` queries of one head and stores its codes.

    `q` has the shape `[N, queries, HEADS * WIDTH]`, `k` and `v` have `[N, keys, HEADS * WIDTH]`; rows are strided. The
    `WIDTH` channels of a head are read as a piece of `HEAD` and a piece of `TAIL` channels, both powers of two; with
    `TAIL` 0 there is no second piece. `scale` includes the factor log2(e), since the exponentials are powers of two.
    """
    batch = tl.program_id(1) // HEADS
    first = tl.program_id(1) % HEADS * WIDTH
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    row_mask = rows < queries
    head = tl.arange(0, HEAD)
    head_mask = head < WIDTH  # all true unless the head is narrower than a matrix instruction
    q += batch.to(tl.int64) * queries * q_stride + first
    k += batch.to(tl.int64) * keys * k_stride + first
    v += batch.to(tl.int64) * keys * v_stride + first
    out += batch.to(tl.int64) * queries * (HEADS * WIDTH) + first
    await_previous(OVERLAP)
    q_head = tl.load(q + rows[:, None] * q_stride + head[None, :], mask=row_mask[:, None] & head_mask[None, :], other=0)
    acc_head = tl.zeros((BM, HEAD), tl.float32)
    if TAIL > 0:
        tail = HEAD + tl.arange(0, TAIL)
        tail_mask = tail < WIDTH
        q_tail = tl.load(
            q + rows[:, None] * q_stride + tail[None, :], mask=row_mask[:, None] & tail_mask[None, :], other=0
        )
        acc_tail = tl.zeros((BM, TAIL), tl.float32)
    largest = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for start in range(0, keys, BN):
        columns = start + tl.arange(0, BN)
        column_mask = columns < keys
        k_at = k + columns[:, None] * k_stride
        v_at = v + columns[:, None] * v_stride
        in_head = column_mask[:, None] & head_mask[None, :]
        k_head = tl.load(k_at + head[None, :], mask=in_head, other=0)
        scores = tl.dot(q_head, k_head.T)
        if TAIL > 0:
            in_tail = column_mask[:, None] & tail_mask[None, :]
            k_tail = tl.load(k_at + tail[None, :], mask=in_tail, other=0)
            scores = tl.dot(q_tail, k_tail.T, scores)
        scores = tl.where(column_mask[None, :], scores * scale, float("-inf"))
        weights, shrink, largest, total = _add_to_softmax(scores, largest, total)
        v_head = tl.load(v_at + head[None, :], mask=in_head, other=0)
        acc_head = tl.dot(weights.to(v_head.dtype), v_head, acc_head * shrink[:, None])
        if TAIL > 0:
            v_tail = tl.load(v_at + tail[None, :], mask=in_tail, other=0)
            acc_tail = tl.dot(weights.to(v_tail.dtype), v_tail, acc_tail * shrink[:, None])

    inverse = reciprocal(tl.load(out_scale))
    zero_point = tl.load(out_zero_point)
    # rounded like the result of an attention that writes floating point
    y_head = (acc_head / total[:, None]).to(q.dtype.element_ty)
    _store(y_head, out, rows, row_mask, head, head_mask, HEADS * WIDTH, inverse, zero_point, QUANT_MAX)
    if TAIL > 0:
        y_tail = (acc_tail / total[:, None]).to(q.dtype.element_ty)
        _store(y_tail, out, rows, row_mask, tail, tail_mask, HEADS * WIDTH, inverse, zero_point, QUANT_MAX)
