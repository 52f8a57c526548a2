"""Decides which attentions the kernel of `attention.cu` computes, and launches it."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edadm_kernels.hopper.attention_variant import (
    BIASED_WIDTHS,
    MAX_WIDTH,
    MULTIPROCESSORS,
    ROW_BYTES,
    AttentionVariant,
    choose,
)
from edadm_kernels.hopper.driver import launch, tensor_map

_NO_LIMIT = 1 << 30  # no query has a higher number
_ALIGNMENT = 16  # addresses and rows of tokens must be multiples of this many bytes to be copied


def takes(q: Tensor, k: Tensor, v: Tensor, scale: float, codes: bool = True, bias: Tensor | None = None) -> bool:
    """Returns whether `launch_attention` supports `q [N, heads, T, d]`, `k` and `v [N, heads, S, d]`.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        scale: Factor of the scores.
        codes: Whether the kernel writes codes; the operands must then be float16, otherwise they may also be bfloat16.
        bias: What is added to the scores of each key, `[N, heads, S]`; it is read in pairs.
    """
    width = q.shape[3]
    if k.shape != (*q.shape[:2], k.shape[2], width) or v.shape != k.shape:
        return False
    others = (k, v) if bias is None else (k, v, bias)
    if any(x.dtype != q.dtype or x.device != q.device for x in others):
        return False
    if bias is not None and (width not in BIASED_WIDTHS or not _is_read_in_pairs(bias, k.shape[:3])):
        return False
    types = (torch.float16,) if codes else (torch.float16, torch.bfloat16)
    sizes = width % 8 == 0 and width <= MAX_WIDTH and k.shape[2] > 0 and scale > 0
    return q.dtype in types and sizes and all(_is_copied(x) for x in (q, k, v))


def _is_read_in_pairs(bias: Tensor, shape: torch.Size) -> bool:
    """Returns whether a number per key has the shape `[N, heads, S]`, and pairs of keys can be read from it."""
    if bias.shape != shape or bias.stride(2) != 1:
        return False
    return not any(step % 2 for step in (*bias.stride()[:2], shape[2], bias.data_ptr() // bias.element_size()))


def _is_copied(x: Tensor) -> bool:
    """Returns whether `[N, heads, tokens, d]` can be copied; a single token or head may have any stride."""
    is_aligned = all(2 * step % _ALIGNMENT == 0 for step in _steps(x)) and x.data_ptr() % _ALIGNMENT == 0
    return is_aligned and x.stride(3) == 1 and all(step >= x.shape[3] for step in _steps(x))


def _steps(x: Tensor) -> tuple[int, int, int]:
    """Returns the strides of heads, tokens and samples of `[N, heads, tokens, d]`, in elements."""
    samples, heads, tokens, width = x.shape
    token = x.stride(2) if tokens > 1 else heads * width
    head = x.stride(1) if heads > 1 else width
    return head, token, x.stride(0) if samples > 1 else max(tokens * token, heads * head)


class _Output(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("scale", "zero_point", "shift", "values")),
        ("quant_max", ctypes.c_float),
    )


class _Problem(ctypes.Structure):
    _fields_ = (
        ("outputs", _Output * 2),
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("queries", "keys", "heads", "tiles", "parts", "first")),
        *((name, ctypes.c_int) for name in ("bias_of_sample", "bias_of_head")),
        ("scale", ctypes.c_float),
    )


@dataclass(frozen=True, eq=False)
class Grid:
    """The grid of the codes that a kernel writes.

    Args:
        scale: The scale, float32, one element; with a shift its inverse.
        zero_point: The zero-point of unsigned codes, int32, one element.
        shift: The zero-point of signed codes, float32, one element, in place of `zero_point`.
        bits: Bits of a code.
    """

    scale: Tensor
    zero_point: Tensor | None
    shift: Tensor | None = None
    bits: int = 8


def launch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    outs: Sequence[Tensor],
    grids: Sequence[Grid] = (),
    bias: Tensor | None = None,
    variant: AttentionVariant | None = None,
) -> None:
    """Fills `outs` with the attention of operands that `takes` accepts.

    Args:
        q: Queries `[N, heads, T, d]`.
        k: Keys `[N, heads, S, d]`.
        v: Values `[N, heads, S, d]`.
        scale: Factor of the scores.
        outs: `[N, T, heads * d]`, contiguous: codes, or values in the type of `q`. With two of them the second has the
            queries after those of the first.
        grids: The grid of each output's codes; empty where outputs are not codes.
        bias: What is added to the scores of each key, `[N, heads, S]` in the type of `q`, contiguous along keys; S is
            even.
        variant: The variant; by default the sizes decide.
    """
    samples, heads, queries, width = q.shape
    keys = k.shape[2]
    if variant is None:
        variant = choose(
            width, queries, keys, samples * heads, bool(grids), q.dtype == torch.bfloat16, bias is not None
        )
    tiles = -(-queries // variant.rows)
    blocks = MULTIPROCESSORS * variant.blocks // (samples * heads)
    parts = min(tiles, max(1, blocks)) if variant.short else tiles
    first = outs[0].shape[1] if len(outs) > 1 else _NO_LIMIT
    problem = _Problem(
        queries=queries, keys=keys, heads=heads, tiles=tiles, parts=parts, first=first, scale=scale * math.log2(math.e)
    )
    if bias is not None:
        problem.bias, problem.bias_of_sample, problem.bias_of_head = bias.data_ptr(), bias.stride(0), bias.stride(1)
    for place, out in enumerate(outs):
        problem.outputs[place].values = out.data_ptr()
    for place, grid in enumerate(grids):
        output = problem.outputs[place]
        output.scale, output.quant_max = grid.scale.data_ptr(), float((1 << grid.bits) - 1)
        output.zero_point = None if grid.zero_point is None else grid.zero_point.data_ptr()
        output.shift = None if grid.shift is None else grid.shift.data_ptr()
    maps = [_map(x, rows) for x, rows in ((q, variant.rows), (k, variant.keys), (v, variant.keys))]
    launch(variant, parts * heads * samples, [*maps, problem], q.device.index or 0)


def _map(x: Tensor, rows: int) -> object:
    """Returns the tensor map of 16-bit `[samples, heads, tokens, d]`; one copy is 64 channels by `rows` tokens."""
    samples, heads, tokens, width = x.shape
    strides = tuple(2 * step for step in _steps(x))
    return tensor_map(
        x.data_ptr(), (2 * width, heads, tokens, samples), (ROW_BYTES, 1, rows, 1), ROW_BYTES, strides=strides
    )
