"""GroupNorm (with SiLU) and LayerNorm straight to int8 codes: one read of the state, one byte an element written."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from edadm_kernels.backend import uses_hopper, uses_kernel
from edadm_kernels.checks import check_affine, check_bits, check_device, check_floating, check_quantizers
from edadm_kernels.hopper import group_norm as hopper_norm
from edadm_kernels.launching import arch_of, on_device_of, overlap
from edadm_kernels.norm_kernels import group_apply, group_fused, group_partials, group_statistics, layer_rows
from edadm_kernels.norm_plans import CHUNK_CHANNELS, CHUNK_ROWS, GroupPlan, group_plan, layer_plan, next_power_of_two
from edadm_kernels.reference import norms as reference
from edadm_kernels.variants import KernelVariant, aligned

SMALL_STATE = 100_000  # elements of a sample up to which one kernel of Triton is faster than two in CUDA C++
LAYER_REGISTERS, FUSED_REGISTERS = 72, 104  # of `layer_rows` and `group_fused` on 8.x; see `_options`
# nothing here is compared bit for bit; said aloud as Triton's default changes
_OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


@torch.library.custom_op("edadm::group_norm_quantize", mutates_args=())
def _group_norm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    scales: Tensor,
    zero_points: Tensor,
    num_bits: int,
    more: Tensor | None = None,
) -> list[Tensor]:
    codes = _prepare_group(x, weight, bias, num_groups, scales, zero_points, num_bits, more)
    if more is not None and not _suits_hopper(x, weight, bias, num_groups, more):
        x, more = torch.cat([x, more], dim=1).contiguous(memory_format=torch.channels_last), None
    if not uses_kernel(x):
        computed = reference.group_norm_quantize(x, weight, bias, num_groups, eps, silu, scales, zero_points, num_bits)
        for target, value in zip(codes, computed, strict=True):
            target.copy_(value)
    elif x.numel():
        with on_device_of(x):
            _launch_group(x, weight, bias, num_groups, eps, silu, scales, zero_points, num_bits, codes, more)
    return codes


@_group_norm_quantize.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    scales: Tensor,
    zero_points: Tensor,
    num_bits: int,
    more: Tensor | None = None,
) -> list[Tensor]:
    return _prepare_group(x, weight, bias, num_groups, scales, zero_points, num_bits, more)


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
) -> list[Tensor]:
    """Codes of GroupNorm(x), or of SiLU(GroupNorm(x)), one tensor a quantizer.

        y = (x - mean) / sqrt(var + eps) * weight + bias        s = quantize(y) or quantize(y * sigmoid(y))

    Statistics and activation in float32, with nothing rounded to the input's dtype in between. A sample's codes do not
    depend on the others of its batch.

    Args:
        x: `[N, C, H, W]` with channels-last strides, float16, bfloat16 or float32.
        weight: `[C]`, floating point.
        bias: `[C]`, floating point.
        num_groups: Divides C.
        eps: Added to the variance.
        silu: Apply SiLU before quantizing.
        scales: `[q]` float32, q of 1 to 3.
        zero_points: `[q]` int32, convention of the unsigned code.
        num_bits: 2 to 8.
        more: Channels that follow those of `x`, as if both were concatenated; C counts both.

    Returns:
        q tensors `[N, C, H, W]`, int8, channels last.

    Raises:
        TypeError: A dtype is not the stated one.
        ValueError: A shape or a layout is not the stated one.

    References:
        GroupNorm, arXiv 1803.08494; SiLU, arXiv 1606.08415; joining partial variances: Chan, Golub and LeVeque, 1983.
    """
    return _group_norm_quantize(x, weight, bias, num_groups, eps, silu, scales, zero_points, num_bits, more)


@torch.library.custom_op("edadm::group_norm", mutates_args=())
def _group_norm(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool) -> Tensor:
    _check_group(x, weight, bias, num_groups)
    if x.numel() and uses_hopper(x) and hopper_norm.takes(x, weight, bias, num_groups):
        out = torch.empty_like(x)
        hopper_norm.launch_group_norm(x, weight, bias, num_groups, eps, silu, [out])
        return out
    y = F.group_norm(x, num_groups, weight.to(x), bias.to(x), eps)
    y = F.silu(y) if silu else y
    # `contiguous` may return a view of one pixel or one channel, which an operation must not
    return torch.empty_like(x).copy_(y)


@_group_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool) -> Tensor:
    _check_group(x, weight, bias, num_groups)
    return torch.empty_like(x)


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool) -> Tensor:
    """GroupNorm(x), or SiLU of it, for a layer that takes floating point; torch's own but for compute capability 9.0.

    Args:
        x: `[N, C, H, W]` with channels-last strides, float16, bfloat16 or float32.
        weight: `[C]`, floating point.
        bias: `[C]`, floating point.
        num_groups: Divides C.
        eps: Added to the variance.
        silu: Apply SiLU.

    Returns:
        As `x`.

    Raises:
        TypeError: A dtype is not the stated one.
        ValueError: A shape or a layout is not the stated one.
    """
    return _group_norm(x, weight, bias, num_groups, eps, silu)


@torch.library.custom_op("edadm::layer_norm_quantize", mutates_args=())
def _layer_norm_quantize(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, scales: Tensor, zero_points: Tensor, num_bits: int
) -> list[Tensor]:
    codes = _prepare_layer(x, weight, bias, scales, zero_points, num_bits)
    if not uses_kernel(x):
        computed = reference.layer_norm_quantize(x, weight, bias, eps, scales, zero_points, num_bits)
        for target, value in zip(codes, computed, strict=True):
            target.copy_(value)
    elif x.numel():
        channels = x.shape[-1]
        plan = layer_plan(channels)
        rows = x.numel() // channels
        with on_device_of(x):
            layer_rows[(triton.cdiv(rows, plan.block_rows),)](
                x, weight, bias, scales, zero_points, *_three(codes), rows, channels, eps,
                QUANT_MAX=(1 << num_bits) - 1, QUANTIZERS=len(codes), **plan.constexprs(),
                num_warps=plan.num_warps, **_options(arch_of(x), LAYER_REGISTERS), **overlap(arch_of(x)),
            )  # fmt: skip
    return codes


@_layer_norm_quantize.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, scales: Tensor, zero_points: Tensor, num_bits: int
) -> list[Tensor]:
    return _prepare_layer(x, weight, bias, scales, zero_points, num_bits)


def layer_norm_quantize(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, scales: Tensor, zero_points: Tensor, num_bits: int = 8
) -> list[Tensor]:
    """Codes of LayerNorm(x) over the last dimension, one tensor a quantizer.

        y = (x - mean) / sqrt(var + eps) * weight + bias        s = quantize(y)

    Statistics in float32. Query, key and value of one input may have a scale each; pass one where they are equal.

    Args:
        x: `[..., C]`, contiguous, float16, bfloat16 or float32.
        weight: `[C]`, floating point.
        bias: `[C]`, floating point.
        eps: Added to the variance.
        scales: `[q]` float32, q of 1 to 3.
        zero_points: `[q]` int32, convention of the unsigned code.
        num_bits: 2 to 8.

    Returns:
        q tensors of the shape of `x`, int8, contiguous.

    Raises:
        TypeError: A dtype is not the stated one.
        ValueError: A shape or a layout is not the stated one.

    References:
        LayerNorm, arXiv 1607.06450.
    """
    return _layer_norm_quantize(x, weight, bias, eps, scales, zero_points, num_bits)


def _options(arch: int, registers: int) -> dict[str, Any]:
    """Options of a kernel; on 8.x with as many registers a thread, since some releases of Triton spill a few there.

    Left to itself the assembler takes fewer, so that more programs are resident: `layer_rows` spills with Triton 3.8,
    `group_fused` with 3.6.
    """
    return {**_OPTIONS, "maxnreg": registers} if 80 <= arch < 90 else _OPTIONS


def _launch_group(
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
) -> None:
    samples, channels = x.shape[0], x.shape[1]
    rows = x.shape[2] * x.shape[3]
    if more is not None or _suits_hopper(x, weight, bias, num_groups):
        quantizers = (scales, zero_points, num_bits)
        hopper_norm.launch_group_norm(x, weight, bias, num_groups, eps, silu, codes, quantizers, more)
        return
    plan = group_plan(rows, channels, num_groups)
    ends = {"QUANT_MAX": (1 << num_bits) - 1, "QUANTIZERS": len(codes), "SILU": silu}
    together = overlap(arch_of(x))
    if plan.fused:
        group_fused[(plan.group_blocks, samples)](
            x, weight, bias, scales, zero_points, *_three(codes), rows, channels, eps,
            **ends, **plan.fused_constexprs(), num_warps=plan.fused_warps,
            **_options(arch_of(x), FUSED_REGISTERS), **together,
        )  # fmt: skip
        return
    partials = x.new_empty((samples, plan.num_chunks, 2, channels), dtype=torch.float32)
    statistics = x.new_empty((samples, 2, channels), dtype=torch.float32)
    column_blocks = triton.cdiv(channels, CHUNK_CHANNELS)
    group_partials[(plan.num_chunks, column_blocks, samples)](
        x, partials, rows, channels, plan.num_chunks, plan.rows_per_chunk,
        **plan.block_constexprs(), num_warps=plan.num_warps, **_OPTIONS, **together,
    )  # fmt: skip
    group_statistics[(plan.group_blocks, samples)](
        partials, weight, statistics, rows, channels, plan.num_chunks, plan.rows_per_chunk, eps,
        **plan.statistics_constexprs(), num_warps=plan.num_warps, **_OPTIONS, **together,
    )  # fmt: skip
    group_apply[(triton.cdiv(rows, CHUNK_ROWS), column_blocks, samples)](
        x, statistics, bias, scales, zero_points, *_three(codes), rows, channels,
        **ends, **plan.block_constexprs(), num_warps=plan.num_warps, **_OPTIONS, **together,
    )  # fmt: skip


def _suits_hopper(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, more: Tensor | None = None) -> bool:
    """Whether the state is large enough for the kernels in CUDA C++, and they take it."""
    elements = (x.numel() + (0 if more is None else more.numel())) // max(x.shape[0], 1)
    large = elements > SMALL_STATE and uses_hopper(x)
    return large and hopper_norm.takes(x, weight, bias, num_groups, more)


def _three(codes: list[Tensor]) -> list[Tensor]:
    """Three outputs for a kernel that writes the first `QUANTIZERS` of them."""
    return (codes + [codes[0]] * 2)[:3]


def _prepare_group(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    scales: Tensor,
    zero_points: Tensor,
    num_bits: int,
    more: Tensor | None,
) -> list[Tensor]:
    check_bits(num_bits)
    check_quantizers(scales, zero_points)
    check_device(x, scales, zero_points)
    _check_group(x, weight, bias, num_groups, more)
    shape = x.shape if more is None else (x.shape[0], x.shape[1] + more.shape[1], *x.shape[2:])
    return [
        torch.empty(shape, dtype=torch.int8, device=x.device, memory_format=torch.channels_last)
        for _ in range(scales.numel())
    ]


def _check_group(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, more: Tensor | None = None) -> None:
    channels = 0
    for image in (x,) if more is None else (x, more):
        check_floating(image)
        check_device(image, weight, bias)
        if image.ndim != 4 or not image.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(
                f"GroupNorm wants [N, C, H, W] with channels-last strides, found shape {tuple(image.shape)} with "
                f"strides {image.stride()}; call .contiguous(memory_format=torch.channels_last) on it first"
            )
        channels += image.shape[1]
    if more is not None:
        check_device(x, more)
        if more.dtype != x.dtype or (more.shape[0], *more.shape[2:]) != (x.shape[0], *x.shape[2:]):
            raise ValueError(
                f"more channels of the same images are wanted, found {more.dtype} {tuple(more.shape)} beside {x.dtype} "
                f"{tuple(x.shape)}"
            )
    check_affine(weight, bias, channels)
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"a number of groups that divides {channels} channels is wanted, found {num_groups}")


def _prepare_layer(
    x: Tensor, weight: Tensor, bias: Tensor, scales: Tensor, zero_points: Tensor, num_bits: int
) -> list[Tensor]:
    check_floating(x)
    check_bits(num_bits)
    check_quantizers(scales, zero_points)
    check_device(x, weight, bias, scales, zero_points)
    if x.ndim < 1 or not x.is_contiguous():
        raise ValueError(
            f"layer_norm_quantize wants contiguous rows, found shape {tuple(x.shape)} with strides {x.stride()}; "
            "call .contiguous() on it first"
        )
    check_affine(weight, bias, x.shape[-1])
    return [torch.empty_like(x, dtype=torch.int8) for _ in range(scales.numel())]


# Height (and width) and channels where the U-Net of Stable Diffusion 1.x normalizes; 32 groups.
_GROUP_SHAPES = [(64, 320), (64, 640), (64, 960), (32, 640), (32, 960), (32, 1280), (32, 1920)]
_GROUP_SHAPES += [(16, 640), (16, 1280), (16, 1920), (16, 2560), (8, 1280), (8, 2560)]
_STATE = {"x": "*fp16", "weight": "*fp32", "bias": "*fp32", "scales": "*fp32", "zero_points": "*i32"}
_CODES = {"out0": "*i8", "out1": "*i8", "out2": "*i8"}
_SIZES = {"rows": "i32", "channels": "i32", "eps": "fp32"}


def variants(arch: int) -> list[KernelVariant]:
    """What the normalizations of a float16 Stable Diffusion 1.x denoiser compile."""
    found: dict[str, KernelVariant] = {}
    for size, channels in _GROUP_SHAPES:
        plan = group_plan(size * size, channels, 32)
        for silu in (True, False):
            found.update({variant.name: variant for variant in _group_variants(arch, plan, silu)})
    for channels in (320, 640, 1280):
        for quantizers in (1, 3):
            variant = _layer_variant(arch, channels, quantizers)
            found[variant.name] = variant
    return list(found.values())


def _group_variants(arch: int, plan: GroupPlan, silu: bool) -> list[KernelVariant]:
    ends = {"QUANT_MAX": 255, "QUANTIZERS": 1, "SILU": silu}
    tail = f"-c{plan.group_channels}{'-silu' if silu else ''}"
    signature = {**_STATE, **_CODES, **_SIZES}
    if plan.fused:
        name = f"group-fused-{next_power_of_two(plan.rows)}x{plan.block_channels}{tail}"
        constexprs = {**ends, **plan.fused_constexprs()}
        options = _options(arch, FUSED_REGISTERS)
        return [aligned(arch, name, group_fused, signature, constexprs, num_warps=plan.fused_warps, options=options)]
    signature |= {"partials": "*fp32", "statistics": "*fp32", "num_chunks": "i32", "rows_per_chunk": "i32"}
    kernels = (
        ("group-partials", group_partials, plan.block_constexprs()),
        (f"group-statistics-c{plan.group_channels}", group_statistics, plan.statistics_constexprs()),
        ("group-apply" + "-silu" * silu, group_apply, {**ends, **plan.block_constexprs()}),
    )
    return [
        aligned(
            arch, name, fn, signature, constexprs, unaligned=("num_chunks",), num_warps=plan.num_warps, options=_OPTIONS
        )
        for name, fn, constexprs in kernels
    ]


def _layer_variant(arch: int, channels: int, quantizers: int) -> KernelVariant:
    plan = layer_plan(channels)
    constexprs = {"QUANT_MAX": 255, "QUANTIZERS": quantizers, **plan.constexprs()}
    return aligned(
        arch,
        f"layer-{channels}-{quantizers}",
        layer_rows,
        {**_STATE, **_CODES, **_SIZES},
        constexprs,
        unaligned=("rows",),
        num_warps=plan.num_warps,
        options=_options(arch, LAYER_REGISTERS),
    )
