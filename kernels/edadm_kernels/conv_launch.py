"""Launches the convolution: grid, compile-time arguments, and the pointwise case as a matrix product."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from edadm_kernels.conv_kernels import conv_kernel
from edadm_kernels.gemm_launch import join, join_variant, launch_gemm, partial_sums, product_types
from edadm_kernels.launching import arch_of, overlap
from edadm_kernels.pack import Padding
from edadm_kernels.tiles import Tile, shipped
from edadm_kernels.variants import KernelVariant, aligned


@dataclass(frozen=True)
class Geometry:
    """Describes a convolution, except for its sizes.

    Args:
        stride: The stride of both axes.
        kh: Height of the kernel.
        kw: Width of the kernel.
        padding: Padding at the top, bottom, left and right.
        upsample: Whether the input is first enlarged by a factor of two with nearest neighbour.
    """

    stride: int
    kh: int
    kw: int
    padding: Padding
    upsample: bool = False

    @property
    def pointwise(self) -> bool:
        """Returns whether it is a matrix product over pixels."""
        return self.kh * self.kw * self.stride == 1 and not any(self.padding) and not self.upsample

    def constexprs(self) -> dict[str, int]:
        """Returns compile-time arguments of `conv_kernel` and `join_kernel`."""
        top, bottom, left, right = self.padding
        sides = {"TOP": top, "BOTTOM": bottom, "LEFT": left, "RIGHT": right}
        return {"STRIDE": self.stride, "KH": self.kh, "KW": self.kw, **sides}


def launch_conv(
    tile: Tile,
    geometry: Geometry,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    sample_bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
) -> None:
    """Fills `out` with the convolution; the other arguments are those of `conv2d`, checked."""
    out_pixels = out.shape[2] * out.shape[3]
    if geometry.pointwise:
        launch_gemm(tile, x, weight, scale, correction, bias, out, sample_bias, residual, out_pixels)
        return
    samples, channels, height, width = x.shape
    m, n = samples * out_pixels, weight.shape[0]
    target = out if tile.split_k == 1 else partial_sums(tile, m, n, x.device)
    grid = (triton.cdiv(m, tile.bm) * triton.cdiv(n, tile.bn), tile.split_k)
    conv_kernel[grid](
        x, weight, scale, correction, bias, sample_bias, residual, target, m, n, channels, height, width,
        out_pixels, out.shape[3],
        **constexprs(tile, geometry, weight.dtype == torch.uint8, channels % tile.bk == 0, out_pixels % tile.bm == 0),
        num_warps=tile.num_warps, num_stages=tile.num_stages, **tile.launch_options(), **overlap(arch_of(x)),
    )  # fmt: skip
    if tile.split_k > 1:
        grown = 2 if geometry.upsample else 1
        image = (out.shape[3], height * grown, width * grown)
        join(
            target, scale, correction, bias, sample_bias, residual, out, m, n, out_pixels, image, geometry.constexprs()
        )


def constexprs(tile: Tile, geometry: Geometry, packed: bool, even_c: bool, one_sample: bool) -> dict[str, Any]:
    """Returns the compile-time arguments of `conv_kernel`."""
    return {
        "W4": packed,
        "EVEN_C": even_c,
        "UPSAMPLE": geometry.upsample,
        "ONE_SAMPLE": one_sample,
        **geometry.constexprs(),
        "SPLIT": tile.split_k > 1,
        "BM": tile.bm,
        "BN": tile.bn,
        "BK": tile.bk,
        "GROUP_M": tile.group_m,
        "COLUMN_PARTS": tile.column_parts,
        "TAPS_INNER": tile.taps_inner,
    }


def variants(arch: int) -> list[KernelVariant]:
    """Lists what `conv2d` compiles: every tile, whole and split, with strides, upsampling, and packed weights."""
    same = Geometry(1, 3, 3, (1, 1, 1, 1))
    listed = [join_variant(arch, same.constexprs(), "join-3x3")]
    for packed in (False, True):
        tiles = shipped(arch, packed)
        for tile in tiles:
            name = f"{tile.bm}x{tile.bn}x{tile.bk}" + ("-w4" if packed else "")
            listed.append(_variant(arch, f"conv-{name}", tile, same, packed))
            listed.append(_variant(arch, f"conv-split-{name}", replace(tile, split_k=4), same, packed))
            listed.append(_variant(arch, f"conv-stride2-{name}", tile, Geometry(2, 3, 3, (1, 1, 1, 1)), packed))
            listed.append(_variant(arch, f"conv-upsample-{name}", tile, Geometry(1, 3, 3, (1, 1, 1, 1), True), packed))
    return listed


def _variant(arch: int, name: str, tile: Tile, geometry: Geometry, packed: bool) -> KernelVariant:
    types = product_types(packed, tile, added=True)
    types |= dict.fromkeys(("C", "height", "width", "out_pixels", "out_width"), "i32")
    return aligned(
        arch,
        name,
        conv_kernel,
        types,
        constexprs(tile, geometry, packed, True, True),
        unaligned=("height", "width", "out_width"),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        options=tile.launch_options(),
    )
