"""Launches the normalization kernels: choice of the kernel, grid, compile-time arguments, and what is compiled."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from edadm_kernels.backend import uses_hopper
from edadm_kernels.hopper import group_norm as hopper_norm
from edadm_kernels.launching import arch_of, overlap
from edadm_kernels.norm_kernels import (
    group_apply,
    group_fused,
    group_partials,
    group_statistics,
    layer_rows,
    modulated_rows,
)
from edadm_kernels.norm_plans import CHUNK_CHANNELS, CHUNK_ROWS, GroupPlan, group_plan, layer_plan, next_power_of_two
from edadm_kernels.variants import KernelVariant, aligned

SMALL_STATE = 100_000  # elements per sample up to which one kernel in Triton is faster than two in CUDA C++
LAYER_REGISTERS, FUSED_REGISTERS = 72, 104  # of `layer_rows` and `group_fused` on 8.x; see `_options`
# No result is compared bit for bit, so sums may be fused; the option is explicit because Triton's default changes.
_OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


def launch_group(
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
    """Fills `codes`; the other arguments are those of `group_norm_quantize`, checked.

    Zero-points in floating point are those of signed codes, and come with inverses of the scales. `more` and `raw` are
    for inputs that `suits_hopper`.
    """
    samples, channels = x.shape[0], x.shape[1]
    rows = x.shape[2] * x.shape[3]
    if more is not None or suits_hopper(x, weight, bias, num_groups):
        quantizers = (scales, zero_points, num_bits)
        hopper_norm.launch_group_norm(x, weight, bias, num_groups, eps, silu, codes, quantizers, more, raw)
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


def launch_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scales: Tensor,
    zero_points: Tensor,
    num_bits: int,
    codes: list[Tensor],
) -> None:
    """Fills `codes`; the other arguments are those of `layer_norm_quantize`, checked."""
    channels = x.shape[-1]
    plan = layer_plan(channels, arch_of(x))
    rows = x.numel() // channels
    layer_rows[(triton.cdiv(rows, plan.block_rows),)](
        x, weight, bias, scales, zero_points, *_three(codes), rows, channels, eps,
        QUANT_MAX=(1 << num_bits) - 1, QUANTIZERS=len(codes), **plan.constexprs(),
        num_warps=plan.num_warps, **_options(arch_of(x), LAYER_REGISTERS), **overlap(arch_of(x)),
    )  # fmt: skip


def launch_modulated(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    inverse_scale: Tensor,
    code_shift: Tensor,
    num_bits: int,
    codes: Tensor,
) -> None:
    """Fills `codes`; the other arguments are those of `modulated_norm_quantize`, checked."""
    samples, tokens, channels = x.shape
    plan = layer_plan(channels, arch_of(x))
    block_rows = plan.block_rows
    while tokens % block_rows:
        block_rows //= 2
    modulated_rows[(samples * tokens // block_rows,)](
        x, scale, shift, inverse_scale, code_shift, codes, samples * tokens, channels, tokens, scale.stride(0),
        shift.stride(0), eps, QUANT_MAX=(1 << num_bits) - 1, **{**plan.constexprs(), "BLOCK_ROWS": block_rows},
        num_warps=plan.num_warps, **_options(arch_of(x), LAYER_REGISTERS), **overlap(arch_of(x)),
    )  # fmt: skip


def suits_hopper(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, more: Tensor | None = None) -> bool:
    """Returns whether the kernels in CUDA C++ support the input and it is large enough for them to be faster."""
    elements = (x.numel() + (0 if more is None else more.numel())) // max(x.shape[0], 1)
    large = elements > SMALL_STATE and uses_hopper(x)
    return large and hopper_norm.takes(x, weight, bias, num_groups, more)


def _three(codes: list[Tensor]) -> list[Tensor]:
    """Returns three outputs for a kernel that writes the first `QUANTIZERS` of them."""
    return (codes + [codes[0]] * 2)[:3]


def _options(arch: int, registers: int) -> dict[str, Any]:
    """Returns the launch options of a kernel.

    On 8.x they fix the number of registers per thread. Otherwise the assembler takes fewer, so that more programs are
    resident, and some releases of Triton spill registers: `layer_rows` with Triton 3.8, `group_fused` with 3.6.
    """
    return {**_OPTIONS, "maxnreg": registers} if 80 <= arch < 90 else _OPTIONS


# Height (equal to the width) and channels of the inputs that the U-Net of Stable Diffusion 1.x normalizes in 32 groups.
_GROUP_SHAPES = [(64, 320), (64, 640), (64, 960), (32, 640), (32, 960), (32, 1280), (32, 1920)]
_GROUP_SHAPES += [(16, 640), (16, 1280), (16, 1920), (16, 2560), (8, 1280), (8, 2560)]
_STATE = {"x": "*fp16", "weight": "*fp32", "bias": "*fp32", "scales": "*fp32", "zero_points": "*i32"}
_CODES = {"out0": "*i8", "out1": "*i8", "out2": "*i8"}
_SIZES = {"rows": "i32", "channels": "i32", "eps": "fp32"}


def variants(arch: int) -> list[KernelVariant]:
    """Lists what the normalizations of a float16 Stable Diffusion 1.x denoiser compile, and rows of one piece."""
    listed: dict[str, KernelVariant] = {}
    for size, channels in _GROUP_SHAPES:
        plan = group_plan(size * size, channels, 32)
        for silu in (True, False):
            listed.update({variant.name: variant for variant in _group_variants(arch, plan, silu)})
    for channels in (128, 320, 640, 1280):
        for quantizers in (1, 3):
            variant = _layer_variant(arch, channels, quantizers)
            listed[variant.name] = variant
    for channels in (1024, 1152, 1536, 3072):
        variant = _modulated_variant(arch, channels)
        listed[variant.name] = variant
    return list(listed.values())


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
    plan = layer_plan(channels, arch)
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


def _modulated_variant(arch: int, channels: int) -> KernelVariant:
    plan = layer_plan(channels, arch)
    vectors = {"scale": "*fp16", "shift": "*fp16", "inverse_scale": "*fp32", "code_shift": "*fp32", "out": "*i8"}
    sizes = {**_SIZES, **dict.fromkeys(("rows_per_sample", "scale_step", "shift_step"), "i32")}
    return aligned(
        arch,
        f"modulated-{channels}",
        modulated_rows,
        {"x": "*fp16", **vectors, **sizes},
        {"QUANT_MAX": 255, **plan.constexprs()},
        num_warps=plan.num_warps,
        options=_options(arch, LAYER_REGISTERS),
    )
