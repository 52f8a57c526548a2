"""Decides which products the kernel of `product.cu` computes and with which tile, and launches it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from edadm_kernels.hopper.driver import launch, tensor_map
from edadm_kernels.hopper.variant import ProductTile
from edadm_kernels.pack import Padding
from edadm_kernels.tiles import Kind

TILES = (
    ProductTile(128, 160, 128, stages=5),
    ProductTile(128, 160, 64, stages=9),
    ProductTile(128, 256, 128, stages=4),
    ProductTile(256, 128, 128, stages=4, groups=4),
    ProductTile(128, 128, 128, stages=3, blocks=2),
    ProductTile(128, 128, 64, stages=6, blocks=2),
    ProductTile(128, 80, 128, stages=4, blocks=2),
    ProductTile(128, 80, 64, stages=7, blocks=2),
    ProductTile(128, 64, 128, stages=4, blocks=2),
    ProductTile(64, 160, 128, stages=4, groups=1, blocks=2),
    ProductTile(64, 80, 128, stages=4, groups=1, blocks=3),
)
SPLITS = (1, 2, 4, 8)
_SPLIT_PRODUCTS = 256  # each part of a split sum has at least this many products
_LONGEST = 256  # pixels that a copy spans in any direction
_ALIGNMENT = 16  # addresses and rows of pixels must be multiples of this many bytes to be copied

# Fitted to 1,107 timings on an H200; the choice costs 2.3% over the best tile of each shape.
_MULTIPROCESSORS = 132
_IN_CLUSTERS = {1: 132, 2: 132, 4: 120, 8: 112}  # cluster size in blocks -> multiprocessors that it can fill
_CLOCK = 4096 * 0.891  # products per clock and multiprocessor
_BYTES = 47.7  # bytes that the L2 delivers per clock and multiprocessor
_STEP = 481.0  # clocks that a step takes at least
_ELEMENT, _GATED = 0.263, 1.14  # clocks of the epilogue per element; the factor for a gated epilogue
_FILL = 1975.0  # clocks until the first step
_JOIN, _JOIN_PART = 2233.0, 1816.0  # clocks of adding up a split sum, and for each part


Grid = tuple[Tensor, Tensor, int]
"""The grid of an output's codes: the scale, the zero-point of unsigned codes (int32), and the largest unsigned code.

Or, as a layer of a loaded export has it: the inverse of the scale, the zero-point of signed codes (float32), and the
largest unsigned code.
"""


class _Problem(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "scale", "correction", "bias", "sample_bias", "residual", "out_scale", "out_zero_point", "out_shift",
                "out",
            )
        ),
        *(
            (name, ctypes.c_int)
            for name in (
                "samples", "height", "width", "channels", "outputs", "seen_height", "seen_width",
                "kernel_height", "kernel_width", "stride", "top", "left", "bottom", "right",
                "box_width_log2", "box_height_log2",
            )
        ),
        ("quant_max", ctypes.c_float),
    )  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Describes a product, except for its number of output channels.

    Args:
        image: Samples, height and width of the output.
        source: Height and width of the input.
        channels: Number of input channels.
        kernel: Height and width of the kernel.
        stride: The stride in both directions, 1 or 2.
        padding: Padding at the top, bottom, left and right.
        upsample: Whether the input is first enlarged by a factor of two with nearest neighbour.
    """

    image: tuple[int, int, int]
    source: tuple[int, int]
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: Padding = (0, 0, 0, 0)
    upsample: bool = False

    @classmethod
    def matrix(cls, rows: int, products: int) -> Shape:
        """Returns the shape of a matrix product, which is treated as one image with a single row of `rows` pixels."""
        return cls((1, 1, rows), (1, rows), products)

    def boxes(self, tile: ProductTile) -> tuple[int, int, int]:
        """Returns columns and rows (log2) of the boxes in which pixels are copied, and the number of tiles."""
        samples, height, width = self.image
        if self.upsample:  # a tile is four boxes, one of each parity of row and column
            return boxes(tile.bm // 4, height // 2, width // 2, samples, _LONGEST)
        return boxes(tile.bm, height, width, samples, _LONGEST // self.stride)


@lru_cache(maxsize=1024)
def boxes(pixels: int, height: int, width: int, samples: int, longest: int) -> tuple[int, int, int]:
    """Returns columns and rows (log2) of the boxes of `pixels` pixels that cover the images, and their number."""
    best: tuple[int, int, int] | None = None
    most = pixels.bit_length() - 1
    for columns in range(most, -1, -1):
        for rows in range(most - columns, -1, -1):
            deep = pixels >> (columns + rows)
            if max(1 << columns, 1 << rows, deep) > longest:
                continue
            number = -(-width // (1 << columns)) * -(-height // (1 << rows)) * -(-samples // deep)
            if best is None or number < best[2]:
                best = (columns, rows, number)
    assert best is not None
    return best


def takes(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    out: Tensor,
    sample_bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> bool:
    """Returns whether `launch_product` supports these types and sizes; the caller checks stride and upsampling."""
    added = [t for t in (sample_bias, residual) if t is not None]
    written = out.dtype in (torch.float16, torch.int8) or (out.dtype in (torch.float32, torch.bfloat16) and not added)
    floats = bias is None or bias.dtype == torch.float32
    read = (x, weight, scale, correction, bias, out, sample_bias, residual)
    aligned = all(t is None or t.data_ptr() % _ALIGNMENT == 0 for t in read)
    return (
        weight.dtype == torch.int8
        and written
        and all(t.dtype == torch.float16 for t in added)
        and floats
        and aligned
        and weight.shape[-1] % _ALIGNMENT == 0
        and weight.shape[0] % 8 == 0
    )


def grid_pointers(grid: Grid | None) -> tuple[int | None, int | None, int | None]:
    """Returns the addresses of the scale, of an int32 zero-point and of a float32 one, of which only one exists."""
    if grid is None:
        return None, None, None
    scale, zero_point = grid[0].data_ptr(), grid[1].data_ptr()
    return (scale, None, zero_point) if grid[1].is_floating_point() else (scale, zero_point, None)


def variants() -> list[ProductTile]:
    """Lists every tile for every kind of product, whole and split."""
    listed = []
    for tile in TILES:
        forms: list[dict[str, bool]] = [{}, {"convolution": True}, {"convolution": True, "upsample": True}]
        listed += [replace(tile, split=split, **form) for form in forms for split in SPLITS]
        listed += [replace(tile, floats=True, **form) for form in forms]
        listed += [replace(tile, bfloats=True), replace(tile, codes=True)]
        if _suits(tile, "geglu"):
            listed += [replace(tile, geglu=True), replace(tile, geglu=True, gates_last=True)]
    return listed


@lru_cache(maxsize=4096)
def choose(kind: Kind, shape: Shape, outputs: int) -> ProductTile:
    """Returns the tile with the lowest estimated cost for a product.

    Args:
        kind: `conv` for anything with an image; otherwise the image is one row of M pixels.
        shape: The shape of the product.
        outputs: Number of output channels.
    """
    return min(candidates(kind, shape), key=lambda tile: cost(kind, tile, shape, outputs))


def candidates(kind: Kind, shape: Shape) -> list[ProductTile]:
    """Lists every tile and split that suits a product."""
    form = {"geglu": kind == "geglu", "convolution": kind == "conv", "upsample": shape.upsample}
    tiles = [replace(tile, **form) for tile in TILES if _suits(tile, kind)]
    products = shape.kernel[0] * shape.kernel[1] * shape.channels
    splits = [split for split in SPLITS if split == 1 or (kind != "geglu" and products >= split * _SPLIT_PRODUCTS)]
    return [replace(tile, split=split) for tile in tiles for split in splits]


def _suits(tile: ProductTile, kind: Kind) -> bool:
    """Returns whether a tile suits a kind of product."""
    # a gated product has a long epilogue, during which the multiprocessor's other blocks can multiply
    return kind != "geglu" or tile.blocks > 1


def cost(kind: Kind, tile: ProductTile, shape: Shape, outputs: int) -> float:
    """Estimates the clocks of a product: rounds of blocks, each bound by its products, its loads or latency."""
    blocks = shape.boxes(tile)[2] * -(-outputs // tile.bn) * tile.split
    multiprocessors = _IN_CLUSTERS[tile.split]
    together = min(tile.blocks, -(-blocks // multiprocessors))
    rounds = -(-blocks // (multiprocessors * together))
    steps = shape.kernel[0] * shape.kernel[1] * -(-shape.channels // tile.bk) / tile.split
    compute = tile.bm * tile.bn * tile.bk / _CLOCK
    loads = (tile.bm + tile.bn) * tile.bk / _BYTES
    step = max(compute * together, loads * together, _STEP)
    epilogue = _ELEMENT * (_GATED if kind == "geglu" else 1.0) * tile.bm * tile.bn * together / tile.split
    join = _JOIN + _JOIN_PART * tile.split if tile.split > 1 else 0.0
    return rounds * (_FILL + steps * step + epilogue + join)


def launch_product(
    tile: ProductTile,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    out: Tensor,
    sample_bias: Tensor | None,
    residual: Tensor | None,
    shape: Shape,
    grid: Grid | None = None,
) -> None:
    """Fills `out` with a convolution or a matrix product; the arguments are those of `conv2d`.

    Args:
        tile: The tile, with its split.
        x: Codes, `[samples, height, width, C]` in memory order.
        weight: Codes `[O, kh, kw, C]` in memory order, int8.
        scale: Scales, `[O]`.
        correction: Corrections, `[classes, O]`.
        bias: float32 `[O]`.
        out: float16, `[samples, height, width, O]` in memory order, or float32 or bfloat16 where nothing is added; int8
            where codes are written, of half as many channels by a gated product.
        sample_bias: float16 `[samples, O]`.
        residual: float16, in the shape of `out`.
        shape: The shape of the product.
        grid: The grid of the output, if codes are written.
    """
    if grid is not None and not tile.geglu:
        tile = replace(tile, codes=True)
    if out.dtype in (torch.float32, torch.bfloat16):
        tile = replace(tile, floats=out.dtype == torch.float32, bfloats=out.dtype == torch.bfloat16)
    outputs, taps = weight.shape[0], shape.kernel[0] * shape.kernel[1]
    samples, height, width = shape.image
    columns, rows, number = shape.boxes(tile)
    deep = (tile.bm // (4 if shape.upsample else 1)) >> (columns + rows)
    step = shape.stride
    x_map = tensor_map(
        x.data_ptr(),
        (shape.channels, shape.source[1], shape.source[0], samples),
        (tile.bk, step << columns, step << rows, deep),
        tile.bk,
        (1, step, step, 1),
    )
    w_map = (
        paired_rows(weight, (tile.bk, tile.bn))
        if tile.gates_last
        else tensor_map(weight.data_ptr(), (shape.channels, taps, outputs), (tile.bk, 1, tile.bn), tile.bk)
    )
    top, bottom, left, right = shape.padding
    grown = 2 if shape.upsample else 1
    pointers = (scale, correction, bias, sample_bias, residual)
    problem = _Problem(
        *(None if pointer is None else pointer.data_ptr() for pointer in pointers),
        *grid_pointers(grid), out.data_ptr(),
        samples, height, width, shape.channels, outputs, shape.source[0] * grown, shape.source[1] * grown,
        *shape.kernel, step, top, left, bottom, right, columns, rows, 0.0 if grid is None else float(grid[2]),
    )  # fmt: skip
    launch(tile, number * -(-outputs // tile.bn) * tile.split, [x_map, w_map, problem], x.device.index or 0)


def paired_rows(weight: Tensor, part: tuple[int, int]) -> Any:
    """Returns the tensor map of weights `[2 F, K]`, whose copies alternate rows of values and rows of their gates.

    Args:
        weight: Codes, int8; all values come before all gates.
        part: Channels and rows of one copy.
    """
    pairs, channels = weight.shape[0] // 2, weight.shape[1]
    strides = (pairs * channels, channels)
    return tensor_map(weight.data_ptr(), (channels, 2, pairs), (part[0], 2, part[1] // 2), part[0], strides=strides)
