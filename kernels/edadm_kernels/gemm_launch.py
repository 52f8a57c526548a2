"""Launches the matrix product: grid, compile-time arguments, and the second kernel of a split sum."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from edadm_kernels.gemm_kernels import gemm_kernel, join_kernel
from edadm_kernels.launching import arch_of, overlap
from edadm_kernels.tiles import Tile, shipped
from edadm_kernels.variants import KernelVariant, aligned

JOIN_ROWS, JOIN_COLUMNS = 8, 128


def launch_gemm(
    tile: Tile,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    out: Tensor,
    sample_bias: Tensor | None = None,
    residual: Tensor | None = None,
    rows_per_sample: int = 1,
    geglu: tuple[Tensor, Tensor, int] | None = None,
) -> None:
    """Fills `out` with the product of rows of codes; the arguments are those of `linear`, checked.

    Args:
        tile: The tile, with its split.
        x: M rows of K codes, in memory order (channels last for an image).
        weight: N rows of K codes, or of K / 2 bytes.
        scale: `[N]`.
        correction: `[N]`.
        bias: `[N]`.
        out: M rows of N elements in memory order, or of N / 2 codes.
        sample_bias: `[samples, N]`.
        residual: M rows of N elements in memory order.
        rows_per_sample: Rows that share a row of `sample_bias`.
        geglu: Scale, zero-point and largest unsigned code of a gated output.
    """
    n = weight.shape[0]
    packed = weight.dtype == torch.uint8
    k = weight[0].numel() * (2 if packed else 1)
    m = x.numel() // k
    target = out if tile.split_k == 1 else partial_sums(tile, m, n, x.device)
    out_scale, out_zero_point, geglu_max = geglu or (None, None, 0)
    grid = (triton.cdiv(m, tile.bm) * triton.cdiv(n, tile.bn), tile.split_k)
    gemm_kernel[grid](
        x, weight, scale, correction, bias, sample_bias, residual, out_scale, out_zero_point, target, m, n, k,
        rows_per_sample,
        **constexprs(tile, packed, k % tile.bk == 0, rows_per_sample % tile.bm == 0, geglu_max),
        num_warps=tile.num_warps, num_stages=tile.num_stages, **tile.launch_options(), **overlap(arch_of(x)),
    )  # fmt: skip
    if tile.split_k > 1:
        join(target, scale, correction, bias, sample_bias, residual, out, m, n, rows_per_sample)


def partial_sums(tile: Tile, m: int, n: int, device: torch.device) -> Tensor:
    """Returns memory for the parts of a split sum, int32 `[split_k, m, n]`."""
    return torch.empty((tile.split_k, m, n), dtype=torch.int32, device=device)


def join(
    parts: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    sample_bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    m: int,
    n: int,
    rows_per_sample: int,
    image: tuple[int, int, int] = (1, 1, 1),
    convolution: dict[str, int] | None = None,
) -> None:
    """Adds the parts and computes the epilogue.

    Args:
        parts: int32 `[split_k, m, n]`.
        scale: `[n]`.
        correction: `[n]`, or a border table.
        bias: `[n]`.
        sample_bias: `[samples, n]`.
        residual: `m` rows of `n` elements in memory order.
        out: `m` rows of `n` elements in memory order.
        m: Rows.
        n: Columns.
        rows_per_sample: Rows that share a row of `sample_bias`.
        image: Width of the output; height and width of the input after upsampling.
        convolution: STRIDE, KH, KW, TOP, BOTTOM, LEFT, RIGHT; `None` for a matrix product.
    """
    grid = (triton.cdiv(m, JOIN_ROWS), triton.cdiv(n, JOIN_COLUMNS))
    join_kernel[grid](
        parts, scale, correction, bias, sample_bias, residual, out, m, n, rows_per_sample, *image,
        **(convolution or MATRIX), PARTS=parts.shape[0], BM=JOIN_ROWS, BN=JOIN_COLUMNS,
        num_warps=4, enable_fp_fusion=False, **overlap(arch_of(parts)),
    )  # fmt: skip


MATRIX = {"STRIDE": 1, "KH": 1, "KW": 1, "TOP": 0, "BOTTOM": 0, "LEFT": 0, "RIGHT": 0}


def constexprs(tile: Tile, packed: bool, even_k: bool, one_sample: bool, geglu_max: int = 0) -> dict[str, Any]:
    """Returns the compile-time arguments of `gemm_kernel`."""
    return {
        "W4": packed,
        "EVEN_K": even_k,
        "ONE_SAMPLE": one_sample,
        "GEGLU_MAX": geglu_max,
        "SPLIT": tile.split_k > 1,
        "BM": tile.bm,
        "BN": tile.bn,
        "BK": tile.bk,
        "GROUP_M": tile.group_m,
        "COLUMN_PARTS": tile.column_parts,
    }


def variants(arch: int) -> list[KernelVariant]:
    """Lists what `linear` and `linear_geglu` compile: every tile, whole and split, and with packed weights."""
    listed = [join_variant(arch, MATRIX, "join")]
    for packed in (False, True):
        for tile in shipped(arch, packed):
            name = f"{tile.bm}x{tile.bn}x{tile.bk}" + ("-w4" if packed else "")
            listed.append(_variant(arch, f"gemm-{name}", tile, packed))
            listed.append(_variant(arch, f"gemm-split-{name}", replace(tile, split_k=4), packed))
        for tile in shipped(arch, packed):
            name = f"{tile.bm}x{tile.bn}x{tile.bk}" + ("-w4" if packed else "")
            listed.append(_variant(arch, f"geglu-{name}", tile, packed, geglu_max=255))
    return listed


def product_types(packed: bool, tile: Tile, added: bool) -> dict[str, str]:
    """Returns the types of the arguments that product kernels share; sample bias and residual are there if `added`."""
    types = {"x": "*i8", "weight": "*u8" if packed else "*i8", "scale": "*fp32", "correction": "*i32", "bias": "*fp16"}
    if added:
        types |= {"sample_bias": "*fp16", "residual": "*fp16"}
    return types | {"out": "*i32" if tile.split_k > 1 else "*fp16", "M": "i32", "N": "i32"}


def _variant(arch: int, name: str, tile: Tile, packed: bool, geglu_max: int = 0) -> KernelVariant:
    types = product_types(packed, tile, added=not geglu_max) | {"K": "i32", "rows_per_sample": "i32"}
    if geglu_max:
        types |= {"out_scale": "*fp32", "out_zero_point": "*i32", "out": "*i8"}
    absent = {argument: None for argument in ("sample_bias", "residual", "out_scale", "out_zero_point")}
    known = absent | constexprs(tile, packed, True, True, geglu_max)
    return aligned(
        arch,
        name,
        gemm_kernel,
        types,
        {argument: value for argument, value in known.items() if argument not in types},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        options=tile.launch_options(),
    )


def join_variant(arch: int, convolution: dict[str, int], name: str) -> KernelVariant:
    """Returns what `join` compiles."""
    types = {"parts": "*i32", "scale": "*fp32", "correction": "*i32", "bias": "*fp16", "sample_bias": "*fp16"}
    types |= {"residual": "*fp16", "out": "*fp16"}
    types |= dict.fromkeys(("M", "N", "rows_per_sample", "out_width", "height", "width"), "i32")
    return aligned(
        arch,
        name,
        join_kernel,
        types,
        {**convolution, "PARTS": 4, "BM": JOIN_ROWS, "BN": JOIN_COLUMNS},
        unaligned=("out_width", "height", "width"),
        options={"enable_fp_fusion": False},
    )
