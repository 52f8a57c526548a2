"""Queries, keys or values of one or two sequences as the heads of one attention, in one kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edadm_kernels.checks import check_device, check_floating, check_rows, check_size
from edadm_kernels.heads_kernels import join_heads_kernel
from edadm_kernels.launching import arch_of, on_device_of, overlap
from edadm_kernels.norm_plans import next_power_of_two
from edadm_kernels.operation import operation
from edadm_kernels.reference import heads as reference
from edadm_kernels.variants import KernelVariant, aligned

WIDTHS = (16, 32, 64, 128, 256)
"""Channels per head that the kernel supports."""
NUM_WARPS = 4
_WIDEST = 1 << 15  # the largest number of channels of all heads


def _empty(
    first: Tensor,
    second: Tensor | None,
    heads: int,
    weights: Sequence[Tensor],
    eps: float,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """Checks the arguments of `join_heads` and returns an empty output."""
    pieces = [first] if second is None else [first, second]
    check_floating(first)
    check_device(*pieces, *weights, cos, sin)
    check_size(*pieces)
    if len(weights) not in (0, len(pieces)):
        raise ValueError(f"join_heads expects a weight for each of {len(pieces)} tensors or none, found {len(weights)}")
    for piece in pieces:
        if piece.dtype != first.dtype:
            raise TypeError(f"join_heads expects tensors of one type, found {first.dtype} and {piece.dtype}")
        if piece.ndim != 3 or piece.shape[0] != first.shape[0] or piece.shape[2] != first.shape[2]:
            raise ValueError(f"join_heads expects tensors [N, T, C], found {[tuple(x.shape) for x in pieces]}")
        check_rows(piece)
    if heads < 1 or first.shape[2] % heads:
        raise ValueError(f"join_heads expects channels for {heads} heads of equal width, found {first.shape[2]}")
    width, length = first.shape[2] // heads, sum(piece.shape[1] for piece in pieces)
    if any(weight.shape != (width,) or not weight.is_contiguous() for weight in weights):
        raise ValueError(f"join_heads expects weights of shape ({width},), found {[tuple(w.shape) for w in weights]}")
    if (cos is None) != (sin is None):
        raise ValueError("join_heads expects cosines and sines together, found one of them")
    for table in (cos, sin):
        if table is not None and (table.shape != (length, width) or not table.is_contiguous() or width % 2):
            raise ValueError(f"join_heads expects rotations of shape {(length, width)}, found {tuple(table.shape)}")
    return torch.empty(first.shape[0], length, heads, width, dtype=first.dtype, device=first.device)


@operation("join_heads", empty=_empty, reference=reference.join_heads)
def join_heads(
    first: Tensor,
    second: Tensor | None,
    heads: int,
    weights: Sequence[Tensor],
    eps: float,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    r"""Joins the heads of one or two sequences; each head is normalized by its root mean square, then rotated.

        y = x / sqrt(mean(x^2) + eps) * weight
        out[2 i] = y[2 i] cos[2 i] - y[2 i + 1] sin[2 i],   out[2 i + 1] = y[2 i + 1] cos[2 i + 1] + y[2 i] sin[2 i + 1]

    The arithmetic is float32 and rounds once at the end.

    Args:
        first: `[N, T_1, heads * d]`, floating point, with evenly spaced rows.
        second: `[N, T_2, heads * d]`, in such a layout, whose tokens follow those of `first`; or `None`.
        heads: The number of heads.
        weights: The weight `[d]` of each tensor's normalization; empty where nothing is normalized.
        eps: The number that is added to the mean of squares.
        cos: float32 `[T_1 + T_2, d]`; `None` where nothing is rotated.
        sin: float32 `[T_1 + T_2, d]`, likewise.

    Returns:
        `[N, T_1 + T_2, heads, d]`, contiguous, in the type of `first`.

    Raises:
        TypeError: A dtype is not the stated one.
        ValueError: A shape, a layout or a device is not the stated one.

    References:
        RMSNorm, arXiv 1910.07467, equation 4; rotary embedding, arXiv 2104.09864, equation 34.
    """
    out = _empty(first, second, heads, weights, eps, cos, sin)
    if not join_heads_takes(first, heads):
        return out.copy_(reference.join_heads(first, second, heads, weights, eps, cos, sin))
    last, tokens = first if second is None else second, out.shape[0] * out.shape[1]
    with on_device_of(first):
        join_heads_kernel[(tokens,)](
            first, last, weights[0] if weights else first, weights[-1] if weights else first,
            first if cos is None else cos, first if sin is None else sin, out,
            first.shape[1], out.shape[1], first.stride(1), last.stride(1), eps,
            HEADS=heads, WIDTH=out.shape[3], NORM=bool(weights), ROTATE=cos is not None,
            BLOCK=next_power_of_two(heads), num_warps=NUM_WARPS, **overlap(arch_of(first)),
        )  # fmt: skip
    return out


def join_heads_takes(x: Tensor, heads: int) -> bool:
    """Returns whether a kernel joins heads of these sizes; otherwise plain torch computes in float64."""
    return x.shape[-1] // heads in WIDTHS and x.shape[-1] <= _WIDEST


def variants(arch: int) -> list[KernelVariant]:
    """Returns what the attentions of FLUX and Stable Diffusion 3.5 compile in float16."""
    result = []
    for heads, width, norm, rotate in ((24, 128, True, True), (24, 64, True, False), (24, 64, False, False)):
        types = dict.fromkeys(("first", "second", "first_weight", "second_weight", "out"), "*fp16")
        types |= dict.fromkeys(("cos", "sin"), "*fp32" if rotate else "*fp16") | {"eps": "fp32"}
        types |= dict.fromkeys(("first_length", "length", "first_stride", "second_stride"), "i32")
        constants = {"HEADS": heads, "WIDTH": width, "NORM": norm, "ROTATE": rotate, "BLOCK": next_power_of_two(heads)}
        name = f"join-heads-{heads}x{width}{'-norm' if norm else ''}{'-rotated' if rotate else ''}"
        lengths = ("first_length", "length")
        result.append(aligned(arch, name, join_heads_kernel, types, constants, unaligned=lengths, num_warps=NUM_WARPS))
    return result
