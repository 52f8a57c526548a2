"""GroupNorm (with SiLU) and LayerNorm straight to int8 codes: one read of the input, one byte written per element."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from edadm_kernels.backend import uses_hopper
from edadm_kernels.checks import (
    MAX_ELEMENTS,
    check_affine,
    check_bits,
    check_device,
    check_floating,
    check_numbers,
    check_quantizers,
)
from edadm_kernels.hopper import group_norm as hopper_norm
from edadm_kernels.launching import on_device_of
from edadm_kernels.norm_launch import SMALL_STATE, launch_group, launch_layer, launch_modulated, suits_hopper, variants
from edadm_kernels.operation import operation
from edadm_kernels.pointwise import quantize, quantize_joined
from edadm_kernels.reference import norms as reference

__all__ = [
    "group_norm",
    "group_norm_joins",
    "group_norm_pays",
    "group_norm_quantize",
    "group_norm_to_codes",
    "layer_norm_quantize",
    "modulated_norm_quantize",
    "variants",
]


def _empty_group(
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
    """Checks the arguments of `group_norm_quantize` and returns empty outputs."""
    check_bits(num_bits)
    check_quantizers(scales, zero_points)
    check_device(x, scales, zero_points)
    _check_group(x, weight, bias, num_groups, more)
    if raw and scales.numel() < 2:
        raise ValueError("a quantizer of the normalization and one of the input as it is are expected, found one")
    return [_empty_image(x, more) for _ in range(scales.numel())]


def _empty_image(x: Tensor, more: Tensor | None) -> Tensor:
    """Returns an empty tensor for the codes of `x` and of the channels that follow those of `x`, channels last."""
    channels = x.shape[1] + (0 if more is None else more.shape[1])
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=torch.int8, device=x.device, memory_format=torch.channels_last)


@operation("group_norm_quantize", empty=_empty_group, reference=reference.group_norm_quantize)
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
    """Returns the codes of GroupNorm(x), or of SiLU(GroupNorm(x)), one tensor per quantizer.

        y = (x - mean) / sqrt(var + eps) * weight + bias        s = quantize(y) or quantize(y * sigmoid(y))

    Statistics and activation are float32; nothing in between is rounded to the type of the input. The codes of a sample
    do not depend on the other samples of its batch.

    Args:
        x: `[N, C, H, W]` with channels-last strides, float16, bfloat16 or float32.
        weight: `[C]`, floating point.
        bias: `[C]`, floating point.
        num_groups: Number of groups of channels; it divides C.
        eps: The number that is added to the variance.
        silu: Whether SiLU is applied before the quantization.
        scales: Scales of 1 to 3 quantizers, float32 `[q]`.
        zero_points: Their zero-points in the convention of unsigned codes, int32 `[q]`.
        num_bits: Bits of the codes, 2 to 8.
        more: Channels that follow those of `x`, as if both were concatenated; C counts both.
        raw: Whether the last of at least two quantizers takes `x` as it is, as the shortcut of a residual block does.

    Returns:
        q tensors `[N, C, H, W]`, int8, channels last.

    Raises:
        TypeError: A dtype is not the stated one.
        ValueError: A shape or a layout is not the stated one.

    References:
        GroupNorm, arXiv 1803.08494; SiLU, arXiv 1606.08415; merged partial variances: Chan, Golub and LeVeque, 1983.
    """
    codes = _empty_group(x, weight, bias, num_groups, eps, silu, scales, zero_points, num_bits, more, raw)
    if raw and not suits_hopper(x, weight, bias, num_groups, more):
        last = (scales[-1:], zero_points[-1:], num_bits)
        codes[-1] = quantize(x, *last) if more is None else quantize_joined(x, more, *last)
        quantizers = (scales[:-1], zero_points[:-1], num_bits)
        _fill_group(x, weight, bias, num_groups, eps, silu, *quantizers, codes[:-1], more)
    else:
        _fill_group(x, weight, bias, num_groups, eps, silu, scales, zero_points, num_bits, codes, more, raw)
    return codes


def _fill_group(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    scales: Tensor,
    zero_points: Tensor,
    num_bits: int,
    codes: list[Tensor],
    more: Tensor | None,
    raw: bool = False,
) -> None:
    if more is not None and not suits_hopper(x, weight, bias, num_groups, more):
        x, more = torch.cat([x, more], dim=1).contiguous(memory_format=torch.channels_last), None
    with on_device_of(x):
        launch_group(x, weight, bias, num_groups, eps, silu, scales, zero_points, num_bits, codes, more, raw)


def _empty_codes(
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
    """Checks the arguments of `group_norm_to_codes` and returns an empty output."""
    check_bits(num_bits)
    check_numbers(inverse_scale, code_shift)
    check_device(x, inverse_scale, code_shift)
    _check_group(x, weight, bias, num_groups, more)
    return _empty_image(x, more)


@operation("group_norm_to_codes", empty=_empty_codes, reference=reference.group_norm_to_codes)
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
    """Computes `group_norm_quantize` with one quantizer, which is given as a layer of a loaded export holds it.

    Args:
        x: As in `group_norm_quantize`, and so all arguments that are not listed here.
        inverse_scale: The reciprocal of the scale of the codes, float32, one element.
        code_shift: Their zero-point in the convention of signed codes, float32, one element.

    Returns:
        `[N, C, H, W]`, int8, channels last.

    Raises:
        TypeError: A dtype is not the stated one.
        ValueError: A shape or a layout is not the stated one.
    """
    codes = _empty_codes(x, weight, bias, num_groups, eps, silu, inverse_scale, code_shift, num_bits, more)
    quantizer = (inverse_scale, code_shift, num_bits)
    _fill_group(x, weight, bias, num_groups, eps, silu, *quantizer, [codes], more)
    return codes


def group_norm_pays(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Returns whether `group_norm_to_codes` is faster than what torch compiles: in float16 on compute capability 9.0.

    Args:
        x: `[N, C, H, W]`; it may be a tensor without elements, as torch has them while it traces.
        weight: `[C]`.
        bias: `[C]`.
    """
    types = x.dtype == torch.float16 and weight.dtype == bias.dtype and weight.dtype in (torch.float16, torch.float32)
    return types and uses_hopper(x) and x.is_contiguous(memory_format=torch.channels_last)


def group_norm_joins(x: Tensor, more: Tensor, num_groups: int) -> bool:
    """Returns whether a kernel of `group_norm_to_codes` reads the two images `x` and `more` without a copy of both."""
    pixels, channels = x.shape[2] * x.shape[3], x.shape[1] + more.shape[1]
    in_order = all(image.is_contiguous(memory_format=torch.channels_last) for image in (x, more))
    if not in_order or x.dtype != more.dtype or pixels * channels <= SMALL_STATE:
        return False
    return hopper_norm.group_norm_plan(pixels, channels, num_groups, x.shape[1]) is not None


def _empty_like(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool) -> Tensor:
    """Checks the arguments of `group_norm` and returns an empty output."""
    _check_group(x, weight, bias, num_groups)
    return torch.empty_like(x)


@operation("group_norm", empty=_empty_like)
def group_norm(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool) -> Tensor:
    """Returns GroupNorm(x), or SiLU of it, for a layer that reads floating point.

    Compute capability 9.0 has a kernel for it; elsewhere torch computes it.

    Args:
        x: `[N, C, H, W]` with channels-last strides, float16, bfloat16 or float32.
        weight: `[C]`, floating point.
        bias: `[C]`, floating point.
        num_groups: Number of groups of channels; it divides C.
        eps: The number that is added to the variance.
        silu: Whether SiLU is applied.

    Returns:
        `[N, C, H, W]` in the type and layout of `x`.

    Raises:
        TypeError: A dtype is not the stated one.
        ValueError: A shape or a layout is not the stated one.
    """
    out = _empty_like(x, weight, bias, num_groups, eps, silu)
    if uses_hopper(x) and hopper_norm.takes(x, weight, bias, num_groups):
        hopper_norm.launch_group_norm(x, weight, bias, num_groups, eps, silu, [out])
        return out
    y = torch.group_norm(x, num_groups, weight.to(x), bias.to(x), eps)
    return out.copy_(F.silu(y) if silu else y)


def _empty_layer(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, scales: Tensor, zero_points: Tensor, num_bits: int = 8
) -> list[Tensor]:
    """Checks the arguments of `layer_norm_quantize` and returns empty outputs."""
    check_floating(x)
    check_bits(num_bits)
    check_quantizers(scales, zero_points)
    check_device(x, weight, bias, scales, zero_points)
    if x.ndim < 1 or not x.is_contiguous():
        raise ValueError(
            f"contiguous rows are expected, found shape {tuple(x.shape)} with strides {x.stride()}; "
            "call .contiguous() on the input of layer_norm_quantize first"
        )
    check_affine(weight, bias, x.shape[-1])
    return [x.new_empty(x.shape, dtype=torch.int8) for _ in range(scales.numel())]


@operation("layer_norm_quantize", empty=_empty_layer, reference=reference.layer_norm_quantize)
def layer_norm_quantize(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, scales: Tensor, zero_points: Tensor, num_bits: int = 8
) -> list[Tensor]:
    """Returns the codes of LayerNorm(x) over the last dimension, one tensor per quantizer.

        y = (x - mean) / sqrt(var + eps) * weight + bias        s = quantize(y)

    Statistics are float32. The query, key and value layers of one input may each have a quantizer; where these are
    equal, one is enough.

    Args:
        x: `[..., C]`, contiguous, float16, bfloat16 or float32.
        weight: `[C]`, floating point.
        bias: `[C]`, floating point.
        eps: The number that is added to the variance.
        scales: Scales of 1 to 3 quantizers, float32 `[q]`.
        zero_points: Their zero-points in the convention of unsigned codes, int32 `[q]`.
        num_bits: Bits of the codes, 2 to 8.

    Returns:
        q tensors of the shape of `x`, int8, contiguous.

    Raises:
        TypeError: A dtype is not the stated one.
        ValueError: A shape or a layout is not the stated one.

    References:
        LayerNorm, arXiv 1607.06450.
    """
    codes = _empty_layer(x, weight, bias, eps, scales, zero_points, num_bits)
    with on_device_of(x):
        launch_layer(x, weight, bias, eps, scales, zero_points, num_bits, codes)
    return codes


def _empty_modulated(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    inverse_scale: Tensor,
    code_shift: Tensor,
    num_bits: int = 8,
) -> Tensor:
    """Checks the arguments of `modulated_norm_quantize` and returns an empty output."""
    for floating in (x, scale, shift):
        check_floating(floating)
    check_bits(num_bits)
    check_device(x, scale, shift, inverse_scale, code_shift)
    check_numbers(inverse_scale, code_shift)
    if x.ndim != 3 or scale.shape != (x.shape[0], x.shape[2]) or shift.shape != scale.shape:
        raise ValueError(
            "tokens [N, T, C], a scale and a shift [N, C] are expected, found "
            f"{tuple(x.shape)}, {tuple(scale.shape)} and {tuple(shift.shape)}"
        )
    return x.new_empty(x.shape, dtype=torch.int8)


@operation("modulated_norm_quantize", empty=_empty_modulated, reference=reference.modulated_norm_quantize)
def modulated_norm_quantize(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    inverse_scale: Tensor,
    code_shift: Tensor,
    num_bits: int = 8,
) -> Tensor:
    """Returns the codes of an adaptive LayerNorm, whose scale and shift depend on the sample.

        y = (x - mean) / sqrt(var + eps) * (1 + scale) + shift        s = quantize(y)

    Statistics are float32.

    Args:
        x: `[N, T, C]`, float16, bfloat16 or float32.
        scale: `[N, C]`, of these types.
        shift: `[N, C]`, of these types.
        eps: The number that is added to the variance.
        inverse_scale: The reciprocal of the scale of the codes, float32, one element.
        code_shift: Their zero-point in the convention of signed codes, float32, one element.
        num_bits: Bits of the codes, 2 to 8.

    Returns:
        `[N, T, C]`, int8, contiguous.

    Raises:
        TypeError: A dtype is not the stated one.
        ValueError: A shape is not the stated one.

    References:
        Adaptive LayerNorm of DiT, arXiv 2212.09748.
    """
    codes = _empty_modulated(x, scale, shift, eps, inverse_scale, code_shift, num_bits)
    scale, shift = (t if t.stride(1) == 1 else t.contiguous() for t in (scale, shift))
    with on_device_of(x):
        launch_modulated(x.contiguous(), scale, shift, eps, inverse_scale, code_shift, num_bits, codes)
    return codes


def _check_group(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, more: Tensor | None = None) -> None:
    """Raises an error unless a GroupNorm supports these tensors."""
    channels = 0
    for image in (x,) if more is None else (x, more):
        check_floating(image)
        check_device(image, weight, bias)
        if image.ndim != 4 or not image.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(
                f"[N, C, H, W] with channels-last strides is expected, found shape {tuple(image.shape)} with strides "
                f"{image.stride()}; call .contiguous(memory_format=torch.channels_last) on the input of GroupNorm first"
            )
        channels += image.shape[1]
    if more is not None:
        check_device(x, more)
        if more.dtype != x.dtype or (more.shape[0], *more.shape[2:]) != (x.shape[0], *x.shape[2:]):
            raise ValueError(
                f"more channels of the same images are expected, found {more.dtype} {tuple(more.shape)} beside "
                f"{x.dtype} {tuple(x.shape)}"
            )
    check_affine(weight, bias, channels)
    elements = channels * x.shape[2] * x.shape[3]
    if elements > MAX_ELEMENTS:
        raise ValueError(f"images of at most {MAX_ELEMENTS} elements are expected, found {elements}")
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"a number of groups that divides {channels} channels is expected, found {num_groups}")
