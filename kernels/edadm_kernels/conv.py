"""Convolutions on integer codes: an implicit matrix product over NHWC, from codes to the input of the next layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edadm_kernels import reference
from edadm_kernels.backend import uses_hopper
from edadm_kernels.checks import check_device
from edadm_kernels.conv_launch import Geometry, launch_conv, variants
from edadm_kernels.hopper import product
from edadm_kernels.launching import arch_of, on_device_of
from edadm_kernels.operation import operation
from edadm_kernels.pack import Padding, border_class_count, output_size
from edadm_kernels.product_checks import check_addends, check_codes, check_epilogue, check_output
from edadm_kernels.tiles import Kind, choose

__all__ = ["conv2d", "variants"]

MAX_KERNEL = 5  # a mask of taps has one bit per tap in an int32
FEW_PIXELS = 128  # up to so many output pixels, the split sum in Triton is faster than the kernel in CUDA C++


def _empty(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    sample_bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    padding: Sequence[int],
    upsample: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """Checks the arguments of `conv2d` and returns an empty output."""
    if x.ndim != 4 or weight.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"channels-last codes [N, C, H, W] and weights [O, kh, kw, C] are expected, found {tuple(x.shape)} with "
            f"strides {x.stride()} and {tuple(weight.shape)}; "
            "call .contiguous(memory_format=torch.channels_last) on the codes"
        )
    if max(weight.shape[1:3]) > MAX_KERNEL:
        raise ValueError(f"kernels of at most {MAX_KERNEL}x{MAX_KERNEL} are expected, found {tuple(weight.shape[1:3])}")
    if stride < 1 or len(padding) != 4 or min(padding) < 0:
        raise ValueError(f"a positive stride and four paddings are expected, found {stride} and {tuple(padding)}")
    top, bottom, left, right = padding
    samples, channels, height, width = x.shape
    outputs, kh, kw = weight.shape[:3]
    grown = 2 if upsample else 1
    out_height = output_size(height * grown, kh, stride, top, bottom)
    out_width = output_size(width * grown, kw, stride, left, right)
    if out_height < 1 or out_width < 1:
        raise ValueError(f"an input that a {kh}x{kw} kernel fits into is expected, found {height}x{width}")
    check_device(x, weight, scale, correction, bias, sample_bias, residual)
    check_codes(x, weight, channels)
    check_epilogue(scale, correction, bias, (outputs,), (border_class_count((top, bottom, left, right)), outputs))
    out = x.new_empty((samples, out_height, out_width, outputs), dtype=out_dtype).permute(0, 3, 1, 2)
    _check_added(out, sample_bias, residual)
    check_output(out_dtype, x, weight, out)
    return out


def _check_added(out: Tensor, sample_bias: Tensor | None, residual: Tensor | None) -> None:
    """Raises an error unless what is added to `out` is floating point and has its shape and layout."""
    check_addends(sample_bias, residual)
    if sample_bias is not None and (sample_bias.shape != out.shape[:2] or not sample_bias.is_contiguous()):
        raise ValueError(
            f"a contiguous sample_bias of shape {tuple(out.shape[:2])} is expected, found {tuple(sample_bias.shape)}"
        )
    if residual is not None and (
        residual.shape != out.shape or not residual.is_contiguous(memory_format=torch.channels_last)
    ):
        raise ValueError(
            f"a channels-last residual of shape {tuple(out.shape)} is expected, found {tuple(residual.shape)} with "
            f"strides {residual.stride()}"
        )


@operation("conv2d", empty=_empty, reference=reference.conv2d)
def _conv2d(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    sample_bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    padding: Sequence[int],
    upsample: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    out = _empty(x, weight, scale, correction, bias, sample_bias, residual, stride, padding, upsample, out_dtype)
    top, bottom, left, right = padding
    sides = (top, bottom, left, right)
    geometry = Geometry(stride, weight.shape[1], weight.shape[2], sides, upsample)
    if (
        _suits_hopper(geometry, out)
        and uses_hopper(x)
        and product.takes(x, weight, scale, correction, bias, out, sample_bias, residual)
    ):
        samples, channels, height, width = x.shape
        image, kernel = (samples, out.shape[2], out.shape[3]), (geometry.kh, geometry.kw)
        shape = product.Shape(image, (height, width), channels, kernel, stride, sides, upsample)
        fast = product.choose("conv", shape, out.shape[1])
        product.launch_product(fast, x, weight, scale, correction, bias, out, sample_bias, residual, shape)
    else:
        terms = x.shape[1] * geometry.kh * geometry.kw
        kind: Kind = "linear" if geometry.pointwise else "conv"
        pixels = out.numel() // out.shape[1]
        tile = choose(arch_of(x), kind, pixels, out.shape[1], terms, x.shape[1], weight.dtype == torch.uint8)
        with on_device_of(x):
            launch_conv(tile, geometry, x, weight, scale, correction, bias, sample_bias, residual, out)
    return out


def conv2d(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None = None,
    sample_bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    padding: Padding = (0, 0, 0, 0),
    upsample: bool = False,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Computes a convolution: `y = (sum x w - correction) * scale + bias + sample_bias + residual`.

    Padding stands for the real value 0 and is left out of the sum; `correction` depends on which taps are outside the
    image. The sum is an exact int32; what follows is computed in float32 and rounded once, to `out_dtype`.

    Args:
        x: Codes `[N, C, H, W]`, int8, channels last.
        weight: Codes `[O, kh, kw, C]` int8, or `[O, kh, kw, C / 2]` uint8 from `pack.pack_w4`.
        scale: The scale of the input times those of the weights, float32 `[O]`.
        correction: int32 `[classes, O]`, from `pack.conv_border_table` with the same padding.
        bias: `[O]`, floating point.
        sample_bias: `[N, O]`, floating point, contiguous (the time embedding of a residual block).
        residual: `[N, O, H', W']`, floating point, channels last.
        stride: The stride of both axes.
        padding: Top, bottom, left, right.
        upsample: Whether the input is first enlarged by a factor of two with nearest neighbour; it is not written.
        out_dtype: float16, bfloat16 or float32.

    Returns:
        `[N, O, H', W']`, channels last.

    Raises:
        TypeError: A dtype is not the stated one.
        ValueError: A shape or a layout is not the stated one, or a sum could overflow.
    """
    return _conv2d(x, weight, scale, correction, bias, sample_bias, residual, stride, padding, upsample, out_dtype)


def _suits_hopper(geometry: Geometry, out: Tensor) -> bool:
    """Returns whether the copies of the kernel in CUDA C++ support the geometry and enough pixels make it faster."""
    even = out.shape[2] % 2 == out.shape[3] % 2 == 0
    reached = (geometry.stride == 1 and even) if geometry.upsample else geometry.stride <= 2
    return reached and out.numel() // out.shape[1] > FEW_PIXELS
