"""Attention that multiplies in 8 bits and quantizes its operands when it is called."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from edadm_kernels import reference
from edadm_kernels.attention_codes_kernels import codes_kernel, extremes_kernel, grid_codes_kernel
from edadm_kernels.backend import uses_hopper, uses_kernel
from edadm_kernels.checks import check_bits, check_device, check_floating, check_heads, check_numbers, check_size
from edadm_kernels.hopper import ARCHITECTURE
from edadm_kernels.hopper import attention_int8 as hopper
from edadm_kernels.launching import arch_of, grid_parts, on_device_of, overlap
from edadm_kernels.norm_plans import next_power_of_two
from edadm_kernels.operation import operation
from edadm_kernels.reference.attention import KEY_BLOCK, Codes, empty_codes, row_of
from edadm_kernels.variants import KernelVariant, aligned

__all__ = ["attend_int8", "attend_int8_takes", "attend_on_grids", "variants"]

MAX_WIDTH = 160  # the largest number of channels per head
CHUNK = 256  # the smallest number of tokens whose extremes one program finds
MAX_CHUNKS = 64
TOKENS = 32  # tokens that the program reads at once
NUM_WARPS = 8


def _empty(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    """Checks the operands of an attention and returns an empty output `[N, T, heads, d]`."""
    check_floating(q)
    check_device(q, k, v)
    check_size(q, k, v)
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"operands of one type are expected, found {q.dtype}, {k.dtype} and {v.dtype}")
    check_heads(q, k, v)
    if not 1 <= q.shape[3] <= MAX_WIDTH:
        raise ValueError(f"heads of 1 to {MAX_WIDTH} channels are expected, found {q.shape[3]}")
    for x in (q, k, v):
        if x.stride(3) != 1:
            raise ValueError(f"contiguous channels are expected, found strides {x.stride()}; call .contiguous() first")
    samples, heads, queries, width = q.shape
    return torch.empty(samples, queries, heads, width, dtype=q.dtype, device=q.device)


def _empty_on_grids(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    p_scale: Tensor,
    operand_bits: int,
    weight_bits: int,
) -> Tensor:
    """Checks the arguments of `attend_on_grids` and returns an empty output `[N, T, heads, d]`."""
    check_bits(operand_bits)
    check_bits(weight_bits)
    scales = (q_scale, k_scale, v_scale, p_scale)
    check_numbers(*scales)
    check_device(q, *scales)
    return _empty(q, k, v)


@operation("attend_int8", empty=_empty)
def _attend_int8(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    out = _empty(q, k, v)
    codes = _codes(q, k, v) if uses_kernel(q) else reference.attention_codes(q, k, v)
    if uses_hopper(q) and hopper.takes(q, k, scale):
        hopper.launch_attention(codes, scale, out)
        return out
    return out.copy_(reference.attend_codes(codes, scale, q.dtype))


def attend_int8(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Returns `softmax(q k^T * scale) v` with int8 queries, keys and values and uint8 weights; integer sums are exact.

    In each head, queries are quantized per token, keys per block of 128 tokens and values per channel, by their
    extremes. Keys and values are first centered between the extremes of each channel. Weights are rounded to steps of
    at most 1/127 of the largest weight of their row, and divided by the sum of the rounded weights. A kernel multiplies
    the codes where `attend_int8_takes` returns true; elsewhere plain torch does in float64, which is slow.

    Args:
        q: `[N, heads, T, d]`, floating point, d at most 160; the channels of a token are contiguous.
        k: `[N, heads, S, d]`, of the same type.
        v: `[N, heads, S, d]`, of the same type.
        scale: The factor of the scores.

    Returns:
        `[N, heads, T, d]` in the type of `q`, stored as `[N, T, heads, d]`.

    Raises:
        TypeError: A dtype is not the stated one.
        ValueError: A shape or a layout is not the stated one.

    References:
        SageAttention2, arXiv 2411.10958: centered keys, scales per token and block. FlashAttention-3, arXiv 2407.08608.
    """
    return _attend_int8(q, k, v, scale).transpose(1, 2)


@operation("attend_on_grids", empty=_empty_on_grids)
def _attend_on_grids(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    p_scale: Tensor,
    operand_bits: int,
    weight_bits: int,
) -> Tensor:
    scales = (q_scale, k_scale, v_scale, p_scale)
    out = _empty_on_grids(q, k, v, scale, *scales, operand_bits, weight_bits)
    if not (uses_hopper(q) and hopper.takes(q, k, scale)):
        return out.copy_(reference.attend_on_grids(q, k, v, scale, scales, (operand_bits, weight_bits)))
    hopper.launch_on_grids(_grid_codes(q, k, v, scales, operand_bits), p_scale, weight_bits, scale, out)
    return out


def attend_on_grids(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    scales: tuple[Tensor, Tensor, Tensor, Tensor],
    operand_bits: int = 8,
    weight_bits: int = 8,
) -> Tensor:
    r"""Returns attention whose operands are rounded to the grids of the model, computed in integers.

        o = p_hat v_hat,   p_hat = s_p min(rne(softmax(q_hat k_hat^T scale) / s_p), 2^b - 1)

    Integer sums are exact. Weights are divided by their sum before they are rounded, so the kernel reads keys twice.
    On other compute capabilities than 9.0 the reference computes it.

    Args:
        q: `[N, heads, T, d]`, floating point, d at most 160; the channels of a token are contiguous.
        k: `[N, heads, S, d]`, of the same type.
        v: `[N, heads, S, d]`, of the same type.
        scale: The factor of the scores.
        scales: Scales of queries, keys and values (signed grids) and of weights (unsigned), one float32 element each.
        operand_bits: Bits of the signed grids, 2 to 8.
        weight_bits: Bits of the unsigned grid, 2 to 8.

    Returns:
        `[N, heads, T, d]` in the type of `q`, stored as `[N, T, heads, d]`.

    Raises:
        TypeError: A dtype is not the stated one.
        ValueError: A shape, a layout, a device or a number of bits is not the stated one.
    """
    return _attend_on_grids(q, k, v, scale, *scales, operand_bits, weight_bits).transpose(1, 2)


def attend_int8_takes(q: Tensor, k: Tensor, scale: float) -> bool:
    """Returns whether a kernel computes `attend_int8` for `q [N, heads, T, d]` and `k [N, heads, S, d]`.

    For tensors on the meta device the answer is that of compute capability 9.0.
    """
    return (q.is_meta or uses_hopper(q)) and hopper.takes(q, k, scale)


def _codes(q: Tensor, k: Tensor, v: Tensor) -> Codes:
    """Quantizes the operands with two kernels: the first finds the extremes of keys and values."""
    codes = empty_codes(q, k)
    with on_device_of(q):
        for part in grid_parts(len(q), q.shape[1]):
            _fill(codes.of(part), q[part], k[part], v[part])
    return codes


def _fill(codes: Codes, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Fills the codes of as many samples as fit one grid."""
    samples, heads, queries, width = q.shape
    keys = k.shape[2]
    chunk = _chunk(keys)
    chunks = triton.cdiv(keys, chunk)
    extremes = torch.empty(2, samples * heads, chunks, 2, width, dtype=torch.float32, device=q.device)
    sizes = {"WIDTH": width, "PADDED": next_power_of_two(width)}
    blocks = (triton.cdiv(queries, KEY_BLOCK), triton.cdiv(keys, KEY_BLOCK))
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": False, **overlap(arch_of(q))}
    k_steps, v_steps = k.stride()[:3], v.stride()[:3]
    extremes_kernel[(chunks, samples * heads, 2)](
        k, v, extremes, keys, heads, chunks, *k_steps, *v_steps, **sizes, TOKENS=TOKENS, CHUNK=chunk, **options
    )
    codes_kernel[(blocks[0] + 2 * blocks[1], samples * heads)](
        q, k, v, extremes, codes.q, codes.k, codes.v, codes.q_scale, codes.k_scale, codes.v_scale, codes.v_center,
        queries, keys, heads, chunks, *blocks, codes.v.shape[3], *q.stride()[:3], *k_steps, *v_steps,
        **sizes, ROW=row_of(width), TOKENS=KEY_BLOCK, CHUNKS=next_power_of_two(chunks), **options,
    )  # fmt: skip


def _grid_codes(q: Tensor, k: Tensor, v: Tensor, scales: tuple[Tensor, Tensor, Tensor, Tensor], bits: int) -> Codes:
    """Quantizes the operands on grids that have one scale each."""
    codes = empty_codes(q, k)
    with on_device_of(q):
        for part in grid_parts(len(q), q.shape[1]):
            _fill_on_grids(codes.of(part), q[part], k[part], v[part], scales, bits)
    return replace(codes, q_scale=scales[0], k_scale=scales[1], v_scale=scales[2])


def _fill_on_grids(
    codes: Codes, q: Tensor, k: Tensor, v: Tensor, scales: tuple[Tensor, Tensor, Tensor, Tensor], bits: int
) -> None:
    """Fills the codes of as many samples as fit one grid; those of `codes` that are scales stay as they are."""
    samples, heads, queries, width = q.shape
    keys = k.shape[2]
    blocks = (triton.cdiv(queries, KEY_BLOCK), triton.cdiv(keys, KEY_BLOCK))
    grid_codes_kernel[(blocks[0] + 2 * blocks[1], samples * heads)](
        q, k, v, codes.q, codes.k, codes.v, *scales[:3], queries, keys, heads, *blocks, codes.v.shape[3],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], WIDTH=width, PADDED=next_power_of_two(width),
        ROW=row_of(width), TOKENS=KEY_BLOCK, LOW=-(1 << (bits - 1)), HIGH=(1 << (bits - 1)) - 1,
        num_warps=NUM_WARPS, enable_fp_fusion=False, **overlap(arch_of(q)),
    )  # fmt: skip


def _chunk(keys: int) -> int:
    """Returns the keys whose extremes one program finds, so that there are at most `MAX_CHUNKS` programs per head."""
    return max(CHUNK, next_power_of_two(triton.cdiv(keys, MAX_CHUNKS)))


# Channels per head and tokens of DiT, PixArt, Stable Diffusion 3.5, FLUX and Stable Diffusion 1.x.
_SHAPES = [(72, 256), (72, 4096), (64, 4429), (128, 4608), (40, 4096)]


def variants(arch: int) -> list[KernelVariant]:
    """Lists the kernels that quantize the attention operands of some transformers."""
    listed = []
    steps = [f"{x}_{size}" for x in "qkv" for size in ("sample", "head", "token")]
    options = {"enable_fp_fusion": False}
    for width, tokens in _SHAPES:
        sizes = {"WIDTH": width, "PADDED": next_power_of_two(width)}
        chunk = _chunk(tokens)
        chunks = triton.cdiv(tokens, chunk)
        integers = ("keys", "queries", "heads", "chunks", "query_blocks", "key_blocks", "slots", *steps)
        floats = ("extremes", "out", "q_scale", "k_scale", "v_scale", "v_center")
        types = dict.fromkeys(("q", "k", "v"), "*fp16") | dict.fromkeys(integers, "i32")
        types |= dict.fromkeys(floats, "*fp32") | dict.fromkeys(("q_codes", "k_codes", "v_codes"), "*i8")
        loose = ("keys", "queries", "heads", "chunks", "query_blocks", "key_blocks")
        stored = {"ROW": row_of(width), "TOKENS": KEY_BLOCK}
        kernels: list[tuple[str, Any, dict[str, int]]] = [
            ("extremes", extremes_kernel, {**sizes, "TOKENS": TOKENS, "CHUNK": chunk}),
            ("codes", codes_kernel, {**sizes, **stored, "CHUNKS": next_power_of_two(chunks)}),
        ]
        if arch == ARCHITECTURE:  # elsewhere the reference computes attention on grids
            kernels.append(("grid-codes", grid_codes_kernel, {**sizes, **stored, "LOW": -128, "HIGH": 127}))
        for name, kernel, constants in kernels:
            label = f"attention-{name}-{width}-{tokens}"
            present = {key: types[key] for key in kernel.arg_names if key in types}
            listed.append(
                aligned(arch, label, kernel, present, constants, unaligned=loose, num_warps=NUM_WARPS, options=options)
            )
    return listed
