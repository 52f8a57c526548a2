"""Quantization of a tensor, with or without a SiLU before it."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from edadm_kernels.checks import check_bits, check_device, check_floating, check_quantizers, check_size
from edadm_kernels.launching import arch_of, on_device_of, overlap
from edadm_kernels.operation import operation
from edadm_kernels.pointwise_kernels import quantize_joined_kernel, quantize_kernel
from edadm_kernels.reference import norms as reference
from edadm_kernels.variants import KernelVariant, aligned

BLOCK = 4096
NUM_WARPS = 8


def _empty(x: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int, silu: bool) -> Tensor:
    """Checks the arguments of the operation and returns an empty tensor for the codes."""
    return _prepare(x, scale, zero_point, num_bits)[0]


def _exact(x: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int, silu: bool) -> Tensor:
    """Returns the codes by the reference."""
    compute = reference.silu_quantize if silu else reference.quantize
    return compute(x, scale, zero_point, num_bits)


@operation("quantize", empty=_empty, reference=_exact)
def _quantize(x: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int, silu: bool) -> Tensor:
    codes, columns, row_stride = _prepare(x, scale, zero_point, num_bits)
    with on_device_of(x):
        quantize_kernel[(triton.cdiv(x.numel(), BLOCK),)](
            x, scale, zero_point, codes, x.numel(), columns, row_stride,
            QUANT_MAX=(1 << num_bits) - 1, SILU=silu, DENSE=row_stride == columns, BLOCK=BLOCK,
            num_warps=NUM_WARPS, enable_fp_fusion=False, **overlap(arch_of(x)),
        )  # fmt: skip
    return codes


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int = 8) -> Tensor:
    """Returns the codes of a tensor: `s = clamp(rne(x * (1 / scale)) + zero_point, 0, 2^num_bits - 1) - 128`, int8.

    Args:
        x: Floating point. It is dense in any order of dimensions, and the codes get its strides; or it has rows of
            contiguous elements at one stride, such as some channels of a channels-last tensor, and the codes are dense
            in the same order.
        scale: float32, one element.
        zero_point: int32, one element, in the convention of unsigned codes.
        num_bits: Bits of the codes, 2 to 8.

    Raises:
        TypeError: A dtype is not the stated one.
        ValueError: The layout or a number of elements or bits is not the stated one.
    """
    return _quantize(x, scale, zero_point, num_bits, False)


def silu_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int = 8) -> Tensor:
    """Returns the codes of `x * sigmoid(x)`; arguments and errors are those of `quantize`."""
    return _quantize(x, scale, zero_point, num_bits, True)


def _empty_joined(x: Tensor, more: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int = 8) -> Tensor:
    """Checks the arguments of `quantize_joined` and returns an empty tensor for the codes."""
    check_quantizers(scale, zero_point, count=1)
    check_bits(num_bits)
    check_device(x, more, scale, zero_point)
    for image in (x, more):
        check_floating(image)
        if image.ndim != 4 or not image.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(
                f"[N, C, H, W] with channels-last strides is expected, found shape {tuple(image.shape)} with strides "
                f"{image.stride()}; call .contiguous(memory_format=torch.channels_last) on it first"
            )
    if more.dtype != x.dtype or (more.shape[0], *more.shape[2:]) != (x.shape[0], *x.shape[2:]):
        raise ValueError(
            f"more channels of the same images are expected, found {more.dtype} {tuple(more.shape)} beside "
            f"{x.dtype} {tuple(x.shape)}"
        )
    shape = (x.shape[0], x.shape[1] + more.shape[1], *x.shape[2:])
    codes = torch.empty(shape, dtype=torch.int8, device=x.device, memory_format=torch.channels_last)
    check_size(codes)
    return codes


def _exact_joined(x: Tensor, more: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int = 8) -> Tensor:
    """Returns the codes by the reference."""
    return reference.quantize(torch.cat([x, more], dim=1), scale, zero_point, num_bits)


@operation("quantize_joined", empty=_empty_joined, reference=_exact_joined)
def quantize_joined(x: Tensor, more: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int = 8) -> Tensor:
    """Returns `quantize` of two images whose channels lie side by side, without a copy of both in floating point.

    Args:
        x: `[N, C, H, W]`, floating point, channels last.
        more: `[N, D, H, W]`, of the type and layout of `x`.
        scale: As in `quantize`.
        zero_point: As in `quantize`.
        num_bits: Bits of the codes, 2 to 8.

    Returns:
        `[N, C + D, H, W]`, int8, channels last.

    Raises:
        TypeError: A dtype is not the stated one.
        ValueError: A shape, a layout or a number of elements or bits is not the stated one.
    """
    codes = _empty_joined(x, more, scale, zero_point, num_bits)
    with on_device_of(x):
        quantize_joined_kernel[(triton.cdiv(codes.numel(), BLOCK),)](
            x, more, scale, zero_point, codes, codes.numel(), codes.shape[1], x.shape[1],
            QUANT_MAX=(1 << num_bits) - 1, BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=False,
            **overlap(arch_of(x)),
        )  # fmt: skip
    return codes


def _prepare(x: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int) -> tuple[Tensor, int, int]:
    """Checks the arguments and returns an empty tensor for the codes, and the length and stride of the input's rows."""
    check_floating(x)
    check_quantizers(scale, zero_point, count=1)
    check_device(x, scale, zero_point)
    check_bits(num_bits)
    check_size(x)
    codes = torch.empty_like(x, dtype=torch.int8)
    if codes.stride() == x.stride() or not x.numel() or _strides(codes) == _strides(x):
        return codes, 1, 1
    rows = _even_rows(x)
    if rows is not None:
        columns, row_stride, order = rows
        return torch.empty_like(x, dtype=torch.int8, memory_format=order), columns, row_stride
    raise ValueError(
        f"a dense tensor or evenly spaced rows are expected, found shape {tuple(x.shape)} with strides {x.stride()}; "
        "call .contiguous() on the input of quantize first"
    )


def has_even_rows(x: Tensor) -> bool:
    """Returns whether `quantize` can read `x` as contiguous rows at one stride, and writes codes in the order of `x`.

    The rows are those of the last dimension; for an image `[N, C, H, W]` with channels innermost they are its pixels.
    """
    return _even_rows(x) is not None


def _even_rows(x: Tensor) -> tuple[int, int, torch.memory_format] | None:
    """Returns length and stride of the rows of `x`, and the memory format of its codes; `None` for uneven rows."""
    if x.ndim < 1 or not x.numel():
        return None
    is_image = x.ndim == 4 and x.stride(1) == 1
    dimensions = list(zip(x.shape, x.stride(), strict=True))
    if is_image:
        dimensions.append(dimensions.pop(1))
    # the only dimension of a vector is a column of one element per row
    columns, step = dimensions.pop() if x.ndim > 1 else (1, 1)
    leading = [(size, stride) for size, stride in dimensions if size > 1]
    row_stride = expected = leading[-1][1] if leading else columns
    if columns > 1 and step != 1:
        return None
    for size, stride in reversed(leading):
        if stride != expected:
            return None
        expected *= size
    return columns, row_stride, torch.channels_last if is_image else torch.contiguous_format


def _strides(x: Tensor) -> list[tuple[int, int]]:
    """Returns size and stride of each dimension of more than one element; the stride of others has no meaning."""
    return [(size, stride) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def variants(arch: int) -> list[KernelVariant]:
    """Lists what `quantize`, `silu_quantize` and `quantize_joined` compile for inputs of the denoiser."""
    result = []
    ends = {"scale": "*fp32", "zero_point": "*i32", "codes": "*i8", "count": "i32", "columns": "i32"}
    options = {"enable_fp_fusion": False}
    for dtype, bits, silu, dense in [
        ("fp16", 8, False, True),
        ("bf16", 8, False, True),
        ("fp32", 8, False, True),
        ("fp16", 8, True, True),
        ("fp16", 8, False, False),
    ]:
        constexprs = {"QUANT_MAX": (1 << bits) - 1, "SILU": silu, "DENSE": dense, "BLOCK": BLOCK}
        signature = {"x": f"*{dtype}", **ends, "row_stride": "i32"}
        name = f"{'silu-' if silu else ''}quantize-{dtype}{'' if dense else '-rows'}"
        variant = aligned(arch, name, quantize_kernel, signature, constexprs, num_warps=NUM_WARPS, options=options)
        result.append(variant)
    signature = {"x": "*fp16", "more": "*fp16", **ends, "first": "i32"}
    constexprs = {"QUANT_MAX": 255, "BLOCK": BLOCK}
    name = "quantize-joined-fp16"
    joined = aligned(arch, name, quantize_joined_kernel, signature, constexprs, num_warps=NUM_WARPS, options=options)
    return [*result, joined]
