"""Attention in one kernel, whose result is the codes of the projection that follows it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from edadm_kernels import reference
from edadm_kernels.attention_kernels import attention_kernel
from edadm_kernels.backend import uses_hopper
from edadm_kernels.checks import check_bits, check_device, check_heads, check_numbers, check_output_grid, check_rows
from edadm_kernels.hopper import attention as hopper_attention
from edadm_kernels.hopper import attention_variant
from edadm_kernels.launching import PROGRAM_SHARED_BYTES, arch_of, grid_parts, on_device_of, overlap
from edadm_kernels.norm_plans import next_power_of_two
from edadm_kernels.operation import operation
from edadm_kernels.pack import CODE_OFFSET
from edadm_kernels.pointwise import quantize
from edadm_kernels.variants import KernelVariant, aligned

__all__ = [
    "MAX_HEAD_WIDTH",
    "attend",
    "attend_pays",
    "attend_takes",
    "attend_to_codes",
    "attention_pays",
    "attention_quantize",
    "variants",
]

MAX_HEAD_WIDTH = 256  # channels of a head
SMALL = 250_000_000
"""Multiplications of all scores up to which the Triton kernel is faster than torch's attention and a quantization."""
_EVEN_WIDTH, _SOME_KEYS = 64, 1024  # channels per head and keys from which cuDNN is as fast; see `attend_pays`
NARROWEST = 16  # the smallest number of columns of a matrix instruction's operand
STAGES = 2  # blocks of keys and values that are in shared memory at once


def _empty_quantized(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    scale: float,
    out_scale: Tensor,
    out_zero_point: Tensor,
    num_bits: int = 8,
) -> Tensor:
    """Checks the arguments of `attention_quantize` and returns an empty output."""
    del scale  # every number is a sound factor of the scores
    check_output_grid(num_bits, out_scale, out_zero_point, q, k, v)
    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"operands of one floating-point type are expected, found {q.dtype}, {k.dtype} and {v.dtype}")
    alike = q.ndim == k.ndim == 3 and k.shape == v.shape and (q.shape[0], q.shape[2]) == (k.shape[0], k.shape[2])
    if not alike or k.shape[1] < 1 or heads < 1 or q.shape[2] % heads or not 1 <= q.shape[2] // heads <= MAX_HEAD_WIDTH:
        raise ValueError(
            f"queries [N, T, C], keys and values [N, S, C] with {heads} heads of at most {MAX_HEAD_WIDTH} channels and "
            f"at least one key are expected, found {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    for x in (q, k, v):
        check_rows(x)
    return torch.empty(q.shape, dtype=torch.int8, device=q.device)


@operation("attention_quantize", empty=_empty_quantized, reference=reference.attention_quantize)
def attention_quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    scale: float,
    out_scale: Tensor,
    out_zero_point: Tensor,
    num_bits: int = 8,
) -> Tensor:
    """Returns the codes of `softmax(q k^T * scale) v`, computed per head.

    Scores, softmax and sums are float32. The weights of the values and the result are rounded to the type of `q`, as in
    an attention that writes floating point. Of float32 operands, torch computes the attention and a kernel the codes.

    Args:
        q: Queries `[N, T, heads * d]`, floating point, d at most 256. Rows are contiguous and evenly spaced; they may
            be some columns of a larger matrix.
        k: Keys `[N, S, heads * d]` in such a layout.
        v: Values `[N, S, heads * d]` in such a layout.
        heads: Number of heads.
        scale: The factor of the scores.
        out_scale: The scale of the output's codes, float32, one element.
        out_zero_point: Their zero-point in the convention of unsigned codes, int32, one element.
        num_bits: Bits of the codes, 2 to 8.

    Returns:
        `[N, T, heads * d]`, int8, contiguous.

    Raises:
        TypeError: A dtype is not the stated one.
        ValueError: A shape or a layout is not the stated one.

    References:
        FlashAttention-2, arXiv 2307.08691; on compute capability 9.0 FlashAttention-3, arXiv 2407.08608.
    """
    out = _empty_quantized(q, k, v, heads, scale, out_scale, out_zero_point, num_bits)
    split = [_split(x, heads) for x in (q, k, v)]
    if q.dtype == torch.float32:  # the kernel multiplies in half precision
        attended = F.scaled_dot_product_attention(split[0], split[1], split[2], scale=scale).transpose(1, 2)
        return quantize(attended.reshape(q.shape).contiguous(), out_scale, out_zero_point, num_bits)
    if uses_hopper(q) and hopper_attention.takes(split[0], split[1], split[2], scale):
        grid = hopper_attention.Grid(out_scale, out_zero_point, bits=num_bits)
        hopper_attention.launch_attention(split[0], split[1], split[2], scale, [out], [grid])
    else:
        with on_device_of(q):
            for part in grid_parts(len(q), heads):
                ends = (out_scale, out_zero_point, out[part], num_bits)
                _launch(q[part], k[part], v[part], heads, scale, *ends)
    return out


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    scale: float,
    out_scale: Tensor,
    out_zero_point: Tensor,
    out: Tensor,
    num_bits: int,
) -> None:
    """Fills `out` by the kernel in Triton; the arguments are those of `attention_quantize`, checked."""
    samples, queries, channels = q.shape
    width, keys = channels // heads, k.shape[1]
    tile = _tile(arch_of(q), width, queries, keys)
    attention_kernel[(triton.cdiv(queries, tile["BM"]), samples * heads)](
        q, k, v, out_scale, out_zero_point, out, queries, keys, q.stride(1), k.stride(1), v.stride(1),
        scale * math.log2(math.e), QUANT_MAX=(1 << num_bits) - 1, HEADS=heads, **_pieces(width),
        **tile, **_options(tile), **overlap(arch_of(q)),
    )  # fmt: skip


def _empty_attended(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Checks the operands of `attend` and returns an empty output `[N, T, heads, d]`."""
    check_heads(q, k, v)
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])


@operation("attend", empty=_empty_attended)
def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    if attend_takes(q, k, v, scale, bias):
        out = _empty_attended(q, k, v, scale)
        hopper_attention.launch_attention(q, k, v, scale, [out.flatten(2)], bias=bias)
        return out
    check_heads(q, k, v)
    mask = None if bias is None else bias[:, :, None]
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)
    return attended.reshape(-1).view(attended.shape)  # a dimension of size 1 has the stride of a contiguous tensor too


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Returns `softmax(q k^T * scale + bias) v` in 16 bits.

    The kernel of this package computes it where `attend_takes` returns true, torch's attention elsewhere.

    Args:
        q: `[N, heads, T, d]`, floating point.
        k: `[N, heads, S, d]`, of the same type.
        v: `[N, heads, S, d]`, of the same type.
        scale: The factor of the scores.
        bias: What is added to the scores of each key, `[N, heads, S]`, of the same type.

    Returns:
        `[N, heads, T, d]` in the type of `q`, stored as `[N, T, heads, d]`.

    Raises:
        ValueError: A shape is not the stated one, or there are no keys.
    """
    return _attend(q, k, v, scale, bias).transpose(1, 2)


def _empty_codes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    inverse_scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    num_bits: Sequence[int],
    first: int,
    bias: Tensor | None = None,
) -> list[Tensor]:
    """Checks the arguments of `attend_to_codes` and returns empty outputs."""
    check_heads(q, k, v)
    samples, heads, queries, width = q.shape
    counts = [queries] if len(num_bits) == 1 else [first, queries - first]
    if not (len(inverse_scales) == len(shifts) == len(num_bits) == len(counts)) or min(counts) < 0:
        raise ValueError(
            f"one grid, or two with 0 to {queries} queries on the first are expected, found "
            f"{len(inverse_scales)} scales, {len(shifts)} shifts, {len(num_bits)} numbers of bits, and {first}"
        )
    check_numbers(*inverse_scales, *shifts)
    check_device(q, *inverse_scales, *shifts)
    for bits in num_bits:
        check_bits(bits)
    return [q.new_empty(samples, count, heads * width, dtype=torch.int8) for count in counts]


@operation("attend_to_codes", empty=_empty_codes)
def attend_to_codes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    inverse_scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    num_bits: Sequence[int],
    first: int,
    bias: Tensor | None = None,
) -> list[Tensor]:
    """Returns the codes of `attend`, with one grid for all queries, or one for the first queries and one for the rest.

    Args:
        q: As in `attend`.
        k: As in `attend`.
        v: As in `attend`.
        scale: The factor of the scores.
        inverse_scales: The reciprocal of the scale of each grid, float32, one element.
        shifts: The zero-point of each grid for signed codes, float32, one element.
        num_bits: Bits of the codes of each grid.
        first: The number of queries on the first of two grids, 0 to T; a single grid has all queries.
        bias: As in `attend`.

    Returns:
        int8 `[N, T, heads * d]`, or with two grids one such tensor per grid.

    Raises:
        TypeError: A scale or a shift is not float32.
        ValueError: A shape, a device or a number of bits is not the stated one, there are no keys, or the numbers of
            scales, shifts and bits differ.
    """
    outs = _empty_codes(q, k, v, scale, inverse_scales, shifts, num_bits, first, bias)
    if q.dtype == torch.float16 and attend_takes(q, k, v, scale, bias):
        pairs = [
            (out, hopper_attention.Grid(inverse, None, shift, bits))
            for out, inverse, shift, bits in zip(outs, inverse_scales, shifts, num_bits, strict=True)
            if out.numel()  # the kernel has one output where all queries are on one of two grids
        ]
        hopper_attention.launch_attention(q, k, v, scale, [out for out, _ in pairs], [grid for _, grid in pairs], bias)
        return outs
    pieces = _attend(q, k, v, scale, bias).flatten(2).split([out.shape[1] for out in outs], dim=1)
    for out, piece, inverse, shift, bits in zip(outs, pieces, inverse_scales, shifts, num_bits, strict=True):
        codes = torch.round(piece.float() * inverse) + shift
        out.copy_(codes.clamp(-CODE_OFFSET, (1 << bits) - 1 - CODE_OFFSET))
    return outs


def attend_takes(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> bool:
    """Returns whether this package's kernel computes `attend`: on 9.0, in 16 bits, for heads of 8 to 160 channels.

    For tensors on the meta device the answer is that of compute capability 9.0.
    """
    return (q.is_meta or uses_hopper(q)) and hopper_attention.takes(q, k, v, scale, codes=False, bias=bias)


def attend_pays(queries: int, keys: int, width: int, heads: int) -> bool:
    """Returns whether this package's kernel computes `attend` faster than torch does, as measured on an H100.

    cuDNN's kernel is as fast where a head has 64 channels and the last blocks leave much of the GPU idle.

    Args:
        queries: Queries per sample.
        keys: Keys per sample.
        width: Channels per head.
        heads: Total number of heads of all samples.
    """
    return width != _EVEN_WIDTH or keys <= _SOME_KEYS or attention_variant.fills(width, queries, keys, heads)


def attention_pays(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> bool:
    """Returns whether `attention_quantize` supports these operands faster than torch's attention and a quantization.

    For tensors on the meta device the answer is that of compute capability 9.0.
    """
    split = [_split(x, heads) for x in (q, k, v)]
    if (q.is_meta or uses_hopper(q)) and hopper_attention.takes(split[0], split[1], split[2], scale):
        return True
    return q.shape[2] // heads <= MAX_HEAD_WIDTH and q.numel() * k.shape[1] <= SMALL


def _split(x: Tensor, heads: int) -> Tensor:
    """Returns `[N, T, heads * d]` viewed as `[N, heads, T, d]`."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _pieces(width: int) -> dict[str, int]:
    """Returns a head's channels as a sum of two powers of two that matrix instructions support."""
    head = max(NARROWEST, 1 << (width.bit_length() - 1))
    tail = max(NARROWEST, next_power_of_two(width - head)) if width > head else 0
    return {"WIDTH": width, "HEAD": head, "TAIL": tail}


def _tile(arch: int, width: int, queries: int, keys: int) -> dict[str, int]:
    """Returns queries per program, so that two samples of eight heads fill a GPU, and keys per step of its loop.

    Both are smaller where shared memory is short.
    """
    rows = 128 if queries >= 2048 else 64 if queries >= 512 else 16
    columns = 128 if 64 < keys <= 128 else 64
    pieces = _pieces(width)
    row_bytes = 2 * (pieces["HEAD"] + pieces["TAIL"])
    limit = PROGRAM_SHARED_BYTES.get(arch, min(PROGRAM_SHARED_BYTES.values()))
    while (rows + 2 * STAGES * columns) * row_bytes > limit:  # queries, and keys and values of every stage
        rows, columns = (rows, columns // 2) if columns > 64 or rows == 16 else (max(16, rows // 2), columns)
    return {"BM": rows, "BN": columns}


def _options(tile: dict[str, int]) -> dict[str, Any]:
    """Returns the launch options of a tile; fusion is explicit because Triton's default changes."""
    return {"num_warps": 8 if tile["BM"] == 128 else 4, "num_stages": STAGES, "enable_fp_fusion": True}


# Channels per head, queries and keys of the attentions of Stable Diffusion 1.x, and the widest head of all.
_SHAPES = [(40, 4096, 77), (80, 1024, 77), (80, 1024, 1024), (160, 256, 77), (160, 256, 256), (160, 64, 77)]
_SHAPES += [(160, 64, 64), (MAX_HEAD_WIDTH, 4096, 77)]


def variants(arch: int) -> list[KernelVariant]:
    """Lists what the attentions of a float16 Stable Diffusion 1.x denoiser compile, and the widest heads."""
    listed = []
    for width, queries, keys in _SHAPES:
        tile = _tile(arch, width, queries, keys)
        types = dict.fromkeys(("q", "k", "v"), "*fp16") | {"out_scale": "*fp32", "out_zero_point": "*i32", "out": "*i8"}
        types |= dict.fromkeys(("queries", "keys", "q_stride", "k_stride", "v_stride"), "i32") | {"scale": "fp32"}
        options = _options(tile)
        listed.append(
            aligned(
                arch,
                f"attention-{width}-{queries}x{keys}",
                attention_kernel,
                types,
                {"QUANT_MAX": 255, "HEADS": 8, **_pieces(width), **tile},
                unaligned=("keys",),
                num_warps=options.pop("num_warps"),
                num_stages=options.pop("num_stages"),
                options=options,
            )
        )
    return listed
