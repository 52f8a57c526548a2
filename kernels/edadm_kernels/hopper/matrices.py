"""Decides how `matrices.cu` computes products of large matrices, up to four of one left operand, and launches it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from edadm_kernels.hopper import product
from edadm_kernels.hopper.driver import launch, tensor_map
from edadm_kernels.hopper.instruction import wgmma
from edadm_kernels.hopper.product import Grid, Shape, grid_pointers, paired_rows
from edadm_kernels.tiles import Kind

MOST_MEMBERS = 4
"""The largest number of right operands (members) per launch."""
MOST_CHANNELS = 128
"""The largest number of channels per step of any tile."""
_ROWS = 128  # rows per tile
_WARP_ROWS = 16  # rows per warp
_WARPS, _GROUPS = 8, 2  # warps that multiply, and groups of them
_MULTIPROCESSORS = 132
_ALIGNMENT = 16  # addresses and rows must be multiples of this many bytes to be copied

# Fitted to 89 timings on an H200, which it meets within 10%.
_CLOCK = 4096 * 0.7  # products per clock and multiprocessor
_BYTES = 42.0  # bytes that arrive per clock and multiprocessor
_START = 3000.0  # clocks before the first step and after the last
_TURN = 1400.0  # clocks between two tiles, which decide between tiles of different size
_OTHERS = 1.12  # measured over estimated time of the long sums of `product.cu`
_COLUMN, _GATED = 36.0, 1.2  # clocks of the epilogue per column; the factor for a gated epilogue


@dataclass(frozen=True)
class Addition:
    """Describes what is added to a product: `residual + product * factor`.

    Args:
        residual: `[M, N]`, contiguous, in the element type of the output.
        factor: `[samples, N]` in that type, whose rows are contiguous, or `None`.
    """

    residual: Tensor
    factor: Tensor | None = None


@dataclass(frozen=True)
class MatrixTile:
    """Compile-time parameters of `matrices.cu`.

    Args:
        bn: Columns per tile, a multiple of 32 up to 192; a tile has 128 rows.
        bk: Channels per step, 64 or 128.
        stages: Number of steps whose operands are in shared memory at once.
        cluster: Number of blocks that share the copies of the right operand, 1 or 2.
        raster: Number of rows of tiles that are computed one after another, so that they share operands in the L2.
        bfloats: Whether the output is bfloat16 instead of float16.
        geglu: Whether values and gates alternate in the columns, and the output is codes of half as many columns.
        gates_last: Whether the gates of a right operand follow all values, in place of alternating rows.
        residual: Whether a matrix is added to the product.
    """

    bn: int
    bk: int
    stages: int
    cluster: int
    raster: int = 8
    bfloats: bool = False
    geglu: bool = False
    gates_last: bool = False
    residual: bool = False

    source = "matrices.cu"
    name = "matrices"
    threads = (_WARPS + 4) * 32

    @property
    def box(self) -> int:
        """Returns the columns that are written at once."""
        return 64 if self.geglu else 32

    @property
    def shared_bytes(self) -> int:
        """Returns bytes for operands and barriers of every stage, boxes of outputs per warp, and columns' constants."""
        slots = 4 if self.residual else 2
        boxes = _WARPS * slots * _WARP_ROWS * (32 if self.geglu else 2 * self.box)
        constants = _GROUPS * (3 * 4 * self.bn + 8)
        added = _GROUPS * 2 * self.bn + _WARPS * slots * 8 if self.residual else 0
        return self.stages * ((_ROWS + self.bn) * self.bk + 16) + boxes + constants + added

    def defines(self) -> dict[str, int]:
        """Returns the macros that the source is compiled with."""
        return {
            "BM": _ROWS,
            "BN": self.bn,
            "BK": self.bk,
            "STAGES": self.stages,
            "CLUSTER": self.cluster,
            "RASTER": self.raster,
            "BOX": self.box,
            "BFLOATS": int(self.bfloats),
            "GEGLU": int(self.geglu),
            "GATES_LAST": int(self.gates_last),
            "RESIDUAL": int(self.residual),
        }

    def prelude(self) -> str:
        """Returns the source of `multiply`: `d = a b`, or `d += a b` where `adds` is not zero."""
        return wgmma(self.bn, adds_always=False)

    def label(self) -> str:
        """Returns the name of the tile for tables."""
        form = "-gated" * self.geglu + "-gates-last" * self.gates_last + "-residual" * self.residual
        return f"matrices-{_ROWS}x{self.bn}x{self.bk}-cluster{self.cluster}{form}{'-bf16' if self.bfloats else ''}"


TILES = (
    MatrixTile(192, 128, stages=5, cluster=1),
    MatrixTile(160, 128, stages=5, cluster=1),
    MatrixTile(128, 128, stages=6, cluster=1),
    MatrixTile(128, 128, stages=6, cluster=2),
)
GATED = MatrixTile(128, 128, stages=6, cluster=1, geglu=True)
"""The tile of gated products: wider ones write for longer than the other group of warps multiplies."""
ADDING = tuple(replace(tile, stages=4 if tile.bn == 192 else 5, residual=True) for tile in TILES)
"""The tiles of products to which a matrix is added, which takes the place of stages."""


class _Columns(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("scale", "correction", "bias", "out_scale", "out_zero_point", "out_shift")
        ),
        ("quant_max", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("outputs", "tiles")),
    )


class _Problem(ctypes.Structure):
    _fields_ = (
        ("columns", _Columns * MOST_MEMBERS),
        *((name, ctypes.c_int) for name in ("rows", "products", "row_tiles", "column_tiles", "first_products")),
        *((name, ctypes.c_int) for name in ("rows_per_sample", "factor_stride")),
        ("factor", ctypes.c_void_p),
    )


def takes(
    x: Tensor,
    weights: Sequence[Tensor],
    vectors: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    dtype: torch.dtype,
) -> bool:
    """Returns whether `launch_matrices` supports operands of these types and sizes.

    Args:
        x: Codes `[M, K]`.
        weights: Codes `[N, K]` of each member.
        vectors: Scales and corrections.
        biases: The bias of each member.
        dtype: The element type of the outputs.
    """
    read = (x, *weights, *vectors, *biases)
    return (
        len(weights) <= MOST_MEMBERS
        and dtype in (torch.float16, torch.bfloat16)
        and all(weight.dtype == torch.int8 and weight.shape[0] % 8 == 0 for weight in weights)
        and all(bias is None or bias.dtype == torch.float32 for bias in biases)
        and x.shape[1] % _ALIGNMENT == 0
        and all(t is None or t.data_ptr() % _ALIGNMENT == 0 for t in read)
    )


def takes_codes(out: Tensor) -> bool:
    """Returns whether the copies can write the rows of a matrix of codes."""
    return out.stride(0) % _ALIGNMENT == 0


@lru_cache(maxsize=4096)
def choose(rows: int, outputs: tuple[int, ...], products: int, adds: bool = False) -> MatrixTile:
    """Returns the tile for products of `[rows, products]` with `[n, products]` for each n of `outputs`.

    Args:
        rows: The rows of the left operand.
        outputs: The rows of each right operand.
        products: The terms per sum.
        adds: Whether a matrix is added to the product.
    """
    tiles = ADDING if adds else TILES
    return min(tiles, key=lambda tile: cost(tile, rows, outputs, products) + _TURN * _rounds(tile, rows, outputs))


@lru_cache(maxsize=4096)
def choose_over_single(
    rows: int, outputs: tuple[int, ...], products: int, geglu: bool = False, adds: bool = False
) -> MatrixTile | None:
    """Returns the tile; `None` if one launch of `product.cu` per product is expected to be as fast.

    Args:
        rows: As in `choose`, and so `outputs`, `products` and `adds`.
        geglu: Whether the product is gated.
    """
    if adds and max(outputs) > products:
        return None  # the residual then takes longer to read than to multiply: 119 µs, and 108 µs by `product.cu`
    tile, shape = GATED if geglu else choose(rows, outputs, products, adds), Shape.matrix(rows, products)
    kind: Kind = "geglu" if geglu else "linear"
    others = sum(product.cost(kind, product.choose(kind, shape, n), shape, n) for n in outputs)
    return tile if cost(tile, rows, outputs, products) < _OTHERS * others else None


def cost(tile: MatrixTile, rows: int, outputs: tuple[int, ...], products: int) -> float:
    """Estimates the clocks of the products: of two groups of warps one multiplies while the other writes."""
    steps = -(-products // tile.bk)
    step = max(_ROWS * tile.bn * tile.bk / _CLOCK, (_ROWS + tile.bn / tile.cluster) * tile.bk / _BYTES)
    epilogue = _COLUMN * tile.bn * (_GATED if tile.geglu else 1.0)
    return _START + epilogue + _rounds(tile, rows, outputs) * max(steps * step, epilogue)


def _rounds(tile: MatrixTile, rows: int, outputs: tuple[int, ...]) -> int:
    """Returns the largest number of tiles that a multiprocessor computes."""
    columns = sum(-(-n // tile.bn) for n in outputs)
    tiles = -(-rows // (_ROWS * tile.cluster)) * columns
    return -(-tiles // (_MULTIPROCESSORS // tile.cluster))


def launch_matrices(
    tile: MatrixTile,
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    corrections: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    outs: Sequence[Tensor],
    gelus: Sequence[Grid | None] = (),
    more: Tensor | None = None,
    addition: Addition | None = None,
) -> None:
    """Fills `outs` with the products of `x` and each of `weights`.

    All tensors are contiguous unless stated.

    Args:
        tile: The tile.
        x: Codes `[M, K]`, int8.
        weights: Codes `[N, K]`, int8, of each member.
        scales: float32 `[N]`.
        corrections: int32 `[N]`.
        biases: float32 `[N]`.
        outs: float16 or bfloat16 `[M, N]`, or int8 for a member with a quantizer; rows may have any stride.
        gelus: The grid of each member that is activated and written as codes; by default there are none. The only
            member of a gated tile has one, and an output of half as many columns.
        more: Codes of the columns that follow those of `x`; `x` then has a multiple of `tile.bk` columns.
        addition: What is added to the only member, by a tile that does so.
    """
    bfloats = any(out.dtype == torch.bfloat16 for out in outs)
    if bfloats:
        tile = replace(tile, bfloats=True)
    rows, first = x.shape
    products = first if more is None else first + more.shape[1]
    row_tiles = -(-rows // (_ROWS * tile.cluster))
    problem = _Problem(
        rows=rows, products=products, row_tiles=row_tiles, first_products=first if more is not None else 1 << 30
    )
    box_bytes = 32 if tile.geglu else tile.box
    w_maps, y_maps, r_maps = [], [], []
    for place, (weight, out) in enumerate(zip(weights, outs, strict=True)):
        columns, gelu, bias = problem.columns[place], gelus[place] if gelus else None, biases[place]
        columns.scale, columns.correction = scales[place].data_ptr(), corrections[place].data_ptr()
        columns.bias = None if bias is None else bias.data_ptr()
        if gelu is not None:
            columns.out_scale, columns.out_zero_point, columns.out_shift = grid_pointers(gelu)
            columns.quant_max = float(gelu[2])
        columns.outputs, columns.tiles = weight.shape[0], -(-weight.shape[0] // tile.bn)
        problem.column_tiles += columns.tiles
        part = (tile.bk, tile.bn // tile.cluster)
        w_maps.append(
            paired_rows(weight, part)
            if tile.gates_last
            else tensor_map(weight.data_ptr(), (products, weight.shape[0]), part, tile.bk)
        )
        y_maps.append(_output_map(out, box_bytes * out.itemsize))
    if addition is not None:
        r_maps.append(_output_map(addition.residual, box_bytes * addition.residual.itemsize))
        if addition.factor is not None:
            problem.factor, problem.factor_stride = addition.factor.data_ptr(), addition.factor.stride(0)
            problem.rows_per_sample = rows // addition.factor.shape[0]
    unused = [w_maps[0]] * (MOST_MEMBERS - len(w_maps)), [y_maps[0]] * (MOST_MEMBERS - len(y_maps))
    x_maps = [
        tensor_map(t.data_ptr(), (t.shape[1], rows), (tile.bk, _ROWS), tile.bk)
        for t in (x, x if more is None else more)
    ]
    blocks = min(problem.row_tiles * problem.column_tiles, _MULTIPROCESSORS // tile.cluster) * tile.cluster
    maps = [*x_maps, *w_maps, *unused[0], *y_maps, *unused[1], *r_maps]
    launch(tile, blocks, [*maps, problem], x.device.index or 0)


def _output_map(out: Tensor, box_bytes: int) -> Any:
    """Returns the tensor map of an output, as bytes."""
    rows, columns = out.shape
    size = out.itemsize
    strides = (out.stride(0) * size,)
    return tensor_map(out.data_ptr(), (columns * size, rows), (box_bytes, _WARP_ROWS), box_bytes, strides=strides)


def variants() -> list[MatrixTile]:
    """Lists every tile in both element types, and the gated one for both orders of gates."""
    plain = (replace(tile, bfloats=bfloats) for tile in (*TILES, *ADDING) for bfloats in (False, True))
    return [*plain, GATED, replace(GATED, gates_last=True)]
