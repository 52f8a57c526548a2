r"""Quantization and the normalizations before it, in plain torch: what the kernels are compared with.

    u = clamp(rne(x * (1 / scale)) + zero_point, 0, 2^num_bits - 1)        s = u - 128

`rne` rounds to nearest, ties to even; the reciprocal is computed in float32. Codes are stored as int8 `s`, so that the
tensor cores can multiply them; zero-points are in the convention of the unsigned codes `u`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edadm_kernels.pack import CODE_OFFSET


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int = 8) -> Tensor:
    """Returns the codes `s` of `x`, int8, with the strides of `x`.

    Args:
        x: A tensor of any shape, floating point.
        scale: float32, one element.
        zero_point: int32, one element, in the convention of unsigned codes.
        num_bits: Bits of the codes, 2 to 8.
    """
    rounded = torch.round(x.float() * scale.reshape(()).reciprocal())
    codes = (rounded + zero_point.reshape(())).clamp_(0, (1 << num_bits) - 1)
    return codes.sub_(CODE_OFFSET).to(torch.int8)


def silu_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int = 8) -> Tensor:
    """Returns `quantize(x * sigmoid(x))`; the activation is float64."""
    return quantize(torch.nn.functional.silu(x.double()), scale, zero_point, num_bits)


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
    """Returns the codes of attention over `[N, T, heads * d]`, computed in float64 and rounded to the type of `q`."""
    queries, keys, values = (x.double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = (queries @ keys.transpose(-1, -2) * scale).softmax(dim=-1)
    attended = (weights @ values).transpose(1, 2).flatten(2).to(q.dtype)
    return quantize(attended, out_scale, out_zero_point, num_bits)


def group_norm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    scales: Tensor,
    zero_points: Tensor,
    num_bits: int = 8,
    more: Tensor | None = None,
    raw: bool = False,
) -> list[Tensor]:
    """Returns the codes of GroupNorm(x), or of SiLU(GroupNorm(x)), per quantizer; both computed in float64.

    Args:
        x: `[N, C, H, W]`, channels last.
        weight: `[C]`.
        bias: `[C]`.
        num_groups: Number of groups of channels; it divides C.
        eps: The number that is added to the variance.
        silu: Whether SiLU is applied before the quantization.
        scales: `[q]` float32.
        zero_points: `[q]` int32.
        num_bits: Bits of the codes, 2 to 8.
        more: Channels that follow those of `x`.
        raw: Whether the last quantizer takes the input as it is.
    """
    y = _group_norm(x, weight, bias, num_groups, eps, silu, more)
    if not raw:
        return _quantize_each(y, scales, zero_points, num_bits)
    joined = x if more is None else torch.cat([x, more], dim=1)
    codes = _quantize_each(y, scales[:-1], zero_points[:-1], num_bits)
    return [*codes, quantize(joined, scales[-1], zero_points[-1], num_bits)]


def group_norm_to_codes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    inverse_scale: Tensor,
    code_shift: Tensor,
    num_bits: int = 8,
    more: Tensor | None = None,
) -> Tensor:
    """Computes `edadm_kernels.group_norm_to_codes`; everything before the codes is float64."""
    y = _group_norm(x, weight, bias, num_groups, eps, silu, more)
    return signed_codes(y.float(), inverse_scale, code_shift, num_bits)


def _group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool, more: Tensor | None
) -> Tensor:
    x = x if more is None else torch.cat([x, more], dim=1)
    y = torch.group_norm(x.double(), num_groups, weight.double(), bias.double(), eps)
    if silu:
        y = torch.nn.functional.silu(y)
    return y.contiguous(memory_format=torch.channels_last)


def layer_norm_quantize(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, scales: Tensor, zero_points: Tensor, num_bits: int = 8
) -> list[Tensor]:
    """Returns the codes of LayerNorm(x) over the last dimension, per quantizer; statistics are float64.

    Args:
        x: `[..., C]`, contiguous.
        weight: `[C]`.
        bias: `[C]`.
        eps: The number that is added to the variance.
        scales: `[q]` float32.
        zero_points: `[q]` int32.
        num_bits: Bits of the codes, 2 to 8.
    """
    y = torch.nn.functional.layer_norm(x.double(), x.shape[-1:], weight.double(), bias.double(), eps)
    return _quantize_each(y, scales, zero_points, num_bits)


def modulated_norm_quantize(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    inverse_scale: Tensor,
    code_shift: Tensor,
    num_bits: int = 8,
) -> Tensor:
    """Computes `edadm_kernels.modulated_norm_quantize`; everything before the codes is float64."""
    y = torch.nn.functional.layer_norm(x.double(), x.shape[-1:], eps=eps)
    y = y * (1 + scale.double()[:, None]) + shift.double()[:, None]
    return signed_codes(y.float(), inverse_scale, code_shift, num_bits)


def signed_codes(y: Tensor, inverse_scale: Tensor, code_shift: Tensor, num_bits: int) -> Tensor:
    """Returns the codes of `y`, float32, for a quantizer as a layer of a loaded export holds it."""
    codes = torch.round(y * inverse_scale) + code_shift
    return codes.clamp(-CODE_OFFSET, (1 << num_bits) - 1 - CODE_OFFSET).to(torch.int8)


def _quantize_each(y: Tensor, scales: Tensor, zero_points: Tensor, num_bits: int) -> list[Tensor]:
    """Returns the codes of `y` for each quantizer."""
    return [
        quantize(y, scale, zero_point, num_bits)
        for scale, zero_point in zip(scales.unbind(), zero_points.unbind(), strict=True)
    ]
