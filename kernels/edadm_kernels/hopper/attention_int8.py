"""Decides which 8-bit attentions `attention_int8.cu` computes and how it tiles them, and launches it."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from edadm_kernels.hopper.attention_variant import HEADER, LARGE_TILES_SHARE, AttentionTile
from edadm_kernels.hopper.compilation import source_text
from edadm_kernels.hopper.driver import launch, tensor_map
from edadm_kernels.hopper.instruction import accumulating_wgmma
from edadm_kernels.reference.attention import Codes

WIDTHS = (40, 64, 72, 80, 96, 128, 160)
"""Channels per head for which every tiling compiles to products that overlap."""
MAX_WIDTH = max(WIDTHS)
MAX_KEYS = (2**31 - 1) // (255 * 127)
"""The largest number of keys whose values, times their weights, have a sum that fits an int32."""
_COLUMNS = (8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 144, 160)
"""Numbers of columns that an integer matrix instruction supports (PTX ISA, wgmma)."""


@dataclass(frozen=True)
class AttentionInt8Variant(AttentionTile):
    """Compile-time parameters of `attention_int8.cu`; `keys` is 64 or 128.

    Args:
        bfloats: Whether the kernel writes bfloat16 instead of float16.
        queries: Whether queries are multiplied from registers instead of shared memory.
        static: Whether the operands are on the model's own grids.
    """

    bfloats: bool = False
    queries: bool = False
    static: bool = False

    source = "attention_int8.cu"
    name = "attention_int8"

    @property
    def line(self) -> int:
        """Returns the bytes per swizzled row of queries or keys."""
        return 64 if self.width <= 64 else 128

    @property
    def columns(self) -> int:
        """Returns the channels that the instruction computes; those beyond the channels of the head are zeros."""
        return next(columns for columns in _COLUMNS if columns >= self.width)

    @property
    def shared_bytes(self) -> int:
        """Returns bytes for queries, every stage's keys and values with two barriers each, and the 16-bit result."""
        rows = -(-self.width // self.line) * self.line * (self.rows + self.stages * self.keys)
        barriers = 8 + 32 * self.stages + 16
        return rows + self.stages * self.columns * self.keys + barriers + 2 * self.rows * self.width

    def defines(self) -> dict[str, int]:
        """Returns the macros that the source is compiled with."""
        return {
            "WIDTH": self.width,
            "KEYS": self.keys,
            "STAGES": self.stages,
            "CONSUMERS": self.groups,
            "BLOCKS": self.blocks,
            "REGISTERS": self.registers,
            "COLUMNS": self.columns,
            "BFLOATS": int(self.bfloats),
            "QUERIES": int(self.queries),
            "STATIC": int(self.static),
        }

    def prelude(self) -> str:
        """Returns the shared header, `multiply_scores` and `multiply_values`, which both compute `d (+)= a b^T`."""
        scores = accumulating_wgmma("multiply_scores", self.keys, "k32.s32.s8.s8", self.queries)
        values = accumulating_wgmma("multiply_values", self.columns, "k32.s32.u8.s8", True)
        return "".join([source_text(HEADER), scores, values])

    def label(self) -> str:
        """Returns the name of the variant for tables."""
        extras = (f"-x{self.blocks}" if self.blocks > 1 else "") + "-q" * self.queries
        extras += "-static" * self.static + "-bf16" * self.bfloats
        return f"attention-int8-{self.width}-{self.rows}x{self.keys}{extras}"


class Tiling(NamedTuple):
    """How the kernel divides an attention; the fields are those of `AttentionInt8Variant`."""

    groups: int
    keys: int
    stages: int
    blocks: int
    registers: int


# The key is the largest number of channels per head. Each value has the tiling with large tiles of queries and the one
# with small tiles.
_TILINGS: dict[int, tuple[Tiling, Tiling]] = {
    64: (Tiling(3, 128, 3, 1, 160), Tiling(1, 64, 3, 3, 0)),
    80: (Tiling(4, 64, 4, 1, 112), Tiling(1, 128, 2, 2, 0)),
    MAX_WIDTH: (Tiling(2, 128, 3, 1, 240), Tiling(1, 64, 2, 2, 0)),
}


@lru_cache(maxsize=1024)
def choose(width: int, queries: int, heads: int, bfloats: bool = False, static: bool = False) -> AttentionInt8Variant:
    """Returns the variant that computes an attention; only the sizes and types decide.

    Args:
        width: Channels per head, at most `MAX_WIDTH`.
        queries: Queries per sample.
        heads: Total number of heads of all samples.
        bfloats: Whether the kernel writes bfloat16.
        static: Whether the operands are on the model's own grids.
    """
    limit = min(most for most in _TILINGS if width <= most)
    large, small = (
        AttentionInt8Variant(width, **tiling._asdict(), bfloats=bfloats, static=static) for tiling in _TILINGS[limit]
    )
    return large if large.fills(queries, heads, LARGE_TILES_SHARE) else small


def takes(q: Tensor, k: Tensor, scale: float) -> bool:
    """Returns whether `launch_attention` supports the codes of `q [N, heads, T, d]` and `k [N, heads, S, d]`."""
    is_half = q.dtype in (torch.float16, torch.bfloat16)
    return is_half and q.shape[3] in WIDTHS and k.shape[2] <= MAX_KEYS and scale > 0


# Channels, queries and heads of the attentions of DiT, PixArt, Stable Diffusion 3.5, FLUX and Stable Diffusion 1.x.
_SHAPES = [
    (72, 4096, 32),
    (72, 256, 32),
    (64, 4429, 48),
    (64, 256, 16),
    (128, 4608, 24),
    (128, 256, 24),
    (40, 4096, 16),
]


def variants() -> list[AttentionInt8Variant]:
    """Lists the variants that the attentions of some denoisers compile."""
    chosen = [choose(*shape) for shape in _SHAPES]
    return list(dict.fromkeys([*chosen, choose(128, 4608, 24, True), choose(40, 4096, 16, False, True)]))


class _Problem(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q_scale", "k_scale", "v_scale", "v_center", "out")),
        *((name, ctypes.c_int) for name in ("queries", "keys", "heads", "tiles")),
        ("scale", ctypes.c_float),
        ("most", ctypes.c_float),
    )


def launch_attention(codes: Codes, scale: float, out: Tensor) -> None:
    """Fills `out` with the attention of `codes`.

    Args:
        codes: Operands that `takes` accepts.
        scale: Factor of the scores.
        out: `[N, T, heads, d]`, float16 or bfloat16, contiguous.
    """
    _launch(codes, codes.v_center, 8, scale, out, static=False)


def launch_on_grids(codes: Codes, weight_scale: Tensor, weight_bits: int, scale: float, out: Tensor) -> None:
    """Fills `out` with attention on the model's own grids.

    Args:
        codes: Operands that `takes` accepts, with scales of one element.
        weight_scale: Scale of the grid of the attention weights, one float32 element.
        weight_bits: Bits of the grid of the attention weights.
        scale: Factor of the scores.
        out: `[N, T, heads, d]`, float16 or bfloat16, contiguous.
    """
    _launch(codes, weight_scale, weight_bits, scale, out, static=True)


def _launch(codes: Codes, last: Tensor, bits: int, scale: float, out: Tensor, static: bool) -> None:
    samples, queries, heads, width = out.shape
    keys, slots = codes.k.shape[1], codes.v.shape[3]
    variant = choose(width, queries, samples * heads, out.dtype == torch.bfloat16, static)
    tiles = -(-queries // variant.rows)
    problem = _Problem(
        *(x.data_ptr() for x in (codes.q_scale, codes.k_scale, codes.v_scale, last, out)),
        queries, keys, heads, tiles, scale * math.log2(math.e), float((1 << bits) - 1),
    )  # fmt: skip
    values = tensor_map(
        codes.v.data_ptr(),
        (slots, width, heads, samples),
        (variant.keys, variant.columns, 1, 1),
        variant.keys,
        strides=(slots, slots * width, slots * width * heads),
    )
    maps = [_tokens(codes.q, variant, variant.rows), _tokens(codes.k, variant, variant.keys), values]
    launch(variant, tiles * heads * samples, [*maps, problem], out.device.index or 0)


def _tokens(x: Tensor, variant: AttentionInt8Variant, rows: int) -> object:
    """Returns the tensor map of `[samples, tokens, heads, channels]`; a copy is one line of `rows` tokens of a head."""
    samples, tokens, heads, width = x.shape
    row, head = x.stride(1), x.stride(2)
    return tensor_map(
        x.data_ptr(),
        (width, heads, tokens, samples),
        (variant.line, 1, rows, 1),
        variant.line,
        strides=(head, row, tokens * row),
    )
