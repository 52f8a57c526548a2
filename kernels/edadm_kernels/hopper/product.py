"""Which products the kernel of `product.cu` takes, with which tile, and its launch."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import lru_cache

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
_SPLIT_PRODUCTS = 256  # a part of a sum has at least so many
_ALIGNMENT = 16  # bytes of an address, and of a row of pixels, that the copies want

# Fitted to 1,107 timings on an H200; the choice costs 2.3% over the best tile of each shape.
_MULTIPROCESSORS = 132
_IN_CLUSTERS = {1: 132, 2: 132, 4: 120, 8: 112}  # multiprocessors that clusters of so many blocks can fill
_CLOCK = 4096 * 0.891  # products a clock and multiprocessor
_BYTES = 47.7  # that the L2 gives a clock and multiprocessor
_STEP = 481.0  # clocks that a step takes at least
_ELEMENT, _GATED = 0.263, 1.14  # clocks of the epilogue an element; how many times more with a gate
_FILL = 1975.0  # clocks until the first step
_JOIN, _JOIN_PART = 2233.0, 1816.0  # clocks of adding up a split sum, and for each part


class _Problem(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "scale", "correction", "bias", "sample_bias", "residual", "out_scale", "out_zero_point", "out"
            )
        ),
        *(
            (name, ctypes.c_int)
            for name in (
                "samples", "height", "width", "channels", "outputs", "kernel_height", "kernel_width",
                "top", "left", "bottom", "right", "box_width_log2", "box_height_log2", "tiles",
            )
        ),
        ("quant_max", ctypes.c_float),
    )  # fmt: skip


@lru_cache(maxsize=1024)
def boxes(pixels: int, height: int, width: int, samples: int) -> tuple[int, int, int]:
    """Columns and rows (as powers of two) of the boxes of `pixels` pixels that cover the images, and their number."""
    best: tuple[int, int, int] | None = None
    most = pixels.bit_length() - 1
    for columns in range(most, -1, -1):
        for rows in range(most - columns, -1, -1):
            deep = pixels >> (columns + rows)
            if max(1 << columns, 1 << rows, deep) > 256:
                continue
            number = -(-width // (1 << columns)) * -(-height // (1 << rows)) * -(-samples // deep)
            if best is None or number < best[2]:
                best = (columns, rows, number)
    assert best is not None
    return best


def takes(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, sample_bias: Tensor | None, residual: Tensor | None
) -> bool:
    """Whether `launch_product` serves these types and sizes; stride and upsampling are for the caller to check."""
    halves = all(t is None or t.dtype == torch.float16 for t in (sample_bias, residual))
    floats = bias is None or bias.dtype == torch.float32
    aligned = all(t is None or t.data_ptr() % _ALIGNMENT == 0 for t in (x, weight, out, sample_bias, residual))
    return (
        weight.dtype == torch.int8
        and out.dtype in (torch.float16, torch.int8)
        and halves
        and floats
        and aligned
        and weight.shape[-1] % _ALIGNMENT == 0
        and weight.shape[0] % 8 == 0
    )


@lru_cache(maxsize=4096)
def choose(kind: Kind, image: tuple[int, int, int], taps: int, channels: int, outputs: int) -> ProductTile:
    """The tile of a product.

    Args:
        kind: `conv` for anything with an image; else the image is one row of M pixels.
        image: Samples, height and width.
        taps: Of the kernel.
        channels: Of the input.
        outputs: Channels of the output.
    """
    found = candidates(kind, taps * channels)
    return min(found, key=lambda tile: cost(kind, tile, image, taps, channels, outputs))


def candidates(kind: Kind, products: int) -> list[ProductTile]:
    """Every tile and split that suits a kind, and sums of so many products."""
    # four threads together write whole words of a gated product's codes, 32 columns of its sums
    suited = [tile for tile in TILES if kind != "geglu" or tile.bn % 32 == 0]
    tiles = [replace(tile, geglu=kind == "geglu", convolution=kind == "conv") for tile in suited]
    splits = [split for split in SPLITS if split == 1 or (kind != "geglu" and products >= split * _SPLIT_PRODUCTS)]
    return [replace(tile, split=split) for tile in tiles for split in splits]


def cost(kind: Kind, tile: ProductTile, image: tuple[int, int, int], taps: int, channels: int, outputs: int) -> float:
    """Clocks that a product takes, roughly: rounds of blocks, each bound by its products, its loads, or latency."""
    samples, height, width = image
    blocks = boxes(tile.bm, height, width, samples)[2] * -(-outputs // tile.bn) * tile.split
    room = _IN_CLUSTERS[tile.split]
    together = min(tile.blocks, -(-blocks // room))
    rounds = -(-blocks // (room * together))
    steps = taps * -(-channels // tile.bk) / tile.split
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
    image: tuple[int, int, int],
    kernel: tuple[int, int] = (1, 1),
    padding: Padding = (0, 0, 0, 0),
    geglu: tuple[Tensor, Tensor, int] | None = None,
) -> None:
    """Fill `out` with a convolution of stride 1 or a matrix product; the arguments are those of `conv2d`.

    Args:
        tile: How the product is cut.
        x: Codes, `[samples, height, width, C]` in memory order.
        weight: Codes `[O, kh, kw, C]` in memory order, int8.
        scale: `[O]`.
        correction: `[classes, O]`.
        bias: float32 `[O]`.
        out: float16, `[samples, height, width, O]` in memory order, or codes of half as many channels.
        sample_bias: float16 `[samples, O]`.
        residual: float16, as `out`.
        image: Samples, height and width, of input and output alike.
        kernel: Height and width.
        padding: Top, bottom, left and right.
        geglu: Scale, zero-point and largest unsigned code of a gated output.
    """
    samples, height, width = image
    outputs = weight.shape[0]
    taps = kernel[0] * kernel[1]
    channels = weight[0].numel() // taps
    columns, rows, number = boxes(tile.bm, height, width, samples)
    deep, tiles = tile.bm >> (columns + rows), number * -(-outputs // tile.bn)
    x_map = tensor_map(
        x.data_ptr(), (channels, width, height, samples), (tile.bk, 1 << columns, 1 << rows, deep), tile.bk
    )
    w_map = tensor_map(weight.data_ptr(), (channels, taps, outputs), (tile.bk, 1, tile.bn), tile.bk)
    top, bottom, left, right = padding
    out_scale, out_zero_point, quant_max = geglu or (None, None, 0)
    pointers = (scale, correction, bias, sample_bias, residual, out_scale, out_zero_point, out)
    problem = _Problem(
        *(None if pointer is None else pointer.data_ptr() for pointer in pointers),
        samples, height, width, channels, outputs, *kernel, top, left, bottom, right, columns, rows, tiles,
        float(quant_max),
    )  # fmt: skip
    # blocks of a gated product take tile after tile
    blocks = min(tiles, _MULTIPROCESSORS * tile.blocks) if tile.geglu else tiles * tile.split
    launch(tile, blocks, [x_map, w_map, problem], x.device.index or 0)
