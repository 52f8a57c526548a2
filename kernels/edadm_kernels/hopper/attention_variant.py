"""Decides how the kernel of `attention.cu` divides an attention: its compile-time parameters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from edadm_kernels.hopper.compilation import source_text
from edadm_kernels.hopper.instruction import accumulating_wgmma

HEADER = "attention.cuh"
MAX_WIDTH = 160  # channels per head; the sums of a wider head do not fit
MULTIPROCESSORS = 132
ROW_BYTES = 128  # a swizzled row of 64 channels
LARGE_TILES_SHARE = 0.8  # share of the blocks of all waves from which on large tiles of queries are chosen
_FULL = 0.9  # the share for `fills`


@dataclass(frozen=True)
class AttentionTile:
    """Compile-time parameters that both attention kernels have.

    Args:
        width: Channels per head, a multiple of 8.
        groups: Number of groups of four warps, 1 to 4; each group computes 64 queries.
        keys: Keys per tile of keys; the kernel computes one tile per iteration of its loop.
        stages: Number of tiles of keys and their values that are in shared memory at once.
        blocks: Blocks per multiprocessor.
        registers: Registers per thread that multiplies; 0 leaves the number that it starts with.
    """

    width: int
    groups: int
    keys: int
    stages: int
    blocks: int = 1
    registers: int = 0

    cluster = 1

    @property
    def threads(self) -> int:
        """Returns threads per block: the warps that multiply and one that copies (four if it gives up registers)."""
        return self.groups * 128 + (128 if self.registers else 32)

    @property
    def rows(self) -> int:
        """Returns the queries per tile of queries."""
        return 64 * self.groups

    def fills(self, queries: int, heads: int, share: float) -> bool:
        """Returns whether the tiles of queries are at least this share of the blocks that their waves could run.

        Args:
            queries: Queries per sample.
            heads: Total number of heads of all samples.
            share: A share, 0 to 1.
        """
        tiles, wave = heads * -(-queries // self.rows), MULTIPROCESSORS * self.blocks
        return tiles >= share * wave * -(-tiles // wave)


@dataclass(frozen=True)
class AttentionVariant(AttentionTile):
    """Compile-time parameters of `attention.cu`; `keys` is a multiple of 16 up to 256.

    Args:
        short: Whether all keys fit into one tile.
        codes: Whether the kernel writes codes instead of floating-point values.
        bfloats: Whether operands and result are bfloat16 instead of float16.
        held: Whether queries are held in registers instead of shared memory.
        bias: Whether a number per key is added to the scores.
    """

    short: bool = False
    codes: bool = True
    bfloats: bool = False
    held: bool = False
    bias: bool = False

    source = "attention.cu"
    name = "attention"

    @property
    def shared_bytes(self) -> int:
        """Returns bytes for queries, for every stage's keys and values with two barriers each, and for the result."""
        tiles = 2 if self.short else 1
        operands = -(-self.width // 64) * ROW_BYTES * (tiles * self.rows + 2 * self.stages * self.keys)
        return operands + 16 * tiles + 32 * self.stages + 16 + self.rows * self.width * (1 if self.codes else 2)

    def defines(self) -> dict[str, int]:
        """Returns the macros that the source is compiled with."""
        return {
            "WIDTH": self.width,
            "KEYS": self.keys,
            "STAGES": self.stages,
            "CONSUMERS": self.groups,
            "BLOCKS": self.blocks,
            "REGISTERS": self.registers,
            "SHORT": int(self.short),
            "CODES": int(self.codes),
            "BFLOATS": int(self.bfloats),
            "HELD": int(self.held),
            "BIAS": int(self.bias),
        }

    def prelude(self) -> str:
        """Returns the shared header, `multiply_scores` (`d (+)= a b^T`) and `multiply_values` (`d (+)= a b`)."""
        types = "k16.f32.bf16.bf16" if self.bfloats else "k16.f32.f16.f16"
        # factors of 1 for both operands; then, per operand in shared memory, whether the terms of a sum are strided
        flags = (1, 1, 0) if self.held else (1, 1, 0, 0)
        scores = accumulating_wgmma("multiply_scores", self.keys, types, self.held, flags)
        values = accumulating_wgmma("multiply_values", self.width, types, True, (1, 1, 1))
        return "".join([source_text(HEADER), scores, values])

    def label(self) -> str:
        """Returns the name of the variant for tables."""
        extras = f"-x{self.blocks}" if self.blocks > 1 else ""
        extras += (
            "-short" * self.short
            + "-held" * self.held
            + "-bias" * self.bias
            + ("" if self.codes else "-bf16" if self.bfloats else "-f16")
        )
        return f"attention-{self.width}-{self.rows}x{self.keys}{extras}"


class Tiling(NamedTuple):
    """How the kernel divides an attention whose keys take several tiles; the fields are those of `AttentionVariant`."""

    groups: int
    keys: int
    stages: int
    blocks: int
    registers: int
    held: bool = False


class ShortTiling(NamedTuple):
    """How the kernel divides an attention whose keys fit into one tile."""

    groups: int
    blocks: int
    registers: int


# Chosen by timings on an H200, and on an H100 for 72 and 128 channels. The key is the largest number of channels per
# head. Each value has the tiling with large tiles of queries and the one with small tiles.
_LONG: dict[int, tuple[Tiling, Tiling]] = {
    40: (Tiling(4, 64, 3, 1, 0), Tiling(2, 64, 3, 2, 0)),
    64: (Tiling(4, 64, 3, 1, 112), Tiling(1, 64, 3, 3, 0)),
    72: (Tiling(4, 64, 3, 1, 112), Tiling(2, 128, 2, 1, 240)),
    88: (Tiling(3, 96, 2, 1, 160), Tiling(2, 128, 2, 1, 0)),
    112: (Tiling(2, 64, 2, 1, 0), Tiling(1, 64, 2, 1, 0)),
    128: (Tiling(2, 128, 2, 1, 240), Tiling(1, 64, 2, 1, 0)),
    MAX_WIDTH: (Tiling(2, 64, 2, 1, 0), Tiling(1, 64, 2, 1, 0)),
}
# The tiling with large tiles for `_MANY_QUERIES` queries or more, where it differs.
_MANY: dict[int, Tiling] = {64: Tiling(3, 128, 2, 1, 160), 128: Tiling(2, 128, 2, 1, 240, held=True)}
_MANY_QUERIES = 4096
# The only tiling of attentions that add a number per key to the scores, which need more registers.
_BIASED: dict[int, Tiling] = {64: Tiling(4, 64, 3, 1, 112), 72: Tiling(4, 64, 3, 1, 112)}
BIASED_WIDTHS = tuple(_BIASED)
"""Channels per head for which a number per key may be added to the scores."""
_SHORT: dict[int, tuple[ShortTiling, ShortTiling]] = {
    40: (ShortTiling(4, 1, 112), ShortTiling(1, 3, 0)),
    64: (ShortTiling(1, 3, 0), ShortTiling(1, 3, 0)),
    72: (ShortTiling(1, 2, 0), ShortTiling(1, 2, 0)),
    88: (ShortTiling(1, 2, 0), ShortTiling(1, 2, 0)),
    112: (ShortTiling(1, 1, 0), ShortTiling(1, 1, 0)),
    128: (ShortTiling(1, 1, 0), ShortTiling(1, 1, 0)),
    MAX_WIDTH: (ShortTiling(1, 1, 0), ShortTiling(1, 1, 0)),
}
_FEW_KEYS = (64, 80)  # sizes of a tile that holds all keys


@lru_cache(maxsize=1024)
def choose(
    width: int, queries: int, keys: int, heads: int, codes: bool = True, bfloats: bool = False, bias: bool = False
) -> AttentionVariant:
    """Returns the variant that computes an attention; only the sizes and types decide.

    Args:
        width: Channels per head, at most `MAX_WIDTH`.
        queries: Queries per sample.
        keys: Keys per sample.
        heads: Total number of heads of all samples.
        codes: As in `AttentionVariant`.
        bfloats: As in `AttentionVariant`.
        bias: As in `AttentionVariant`.
    """
    form = {"codes": codes, "bfloats": bfloats, "bias": bias}
    limit = min(most for most in _LONG if width <= most)
    if bias:
        return AttentionVariant(width, **_BIASED[width]._asdict(), **form)
    only_tile = next((most for most in _FEW_KEYS if keys <= most), None)
    if only_tile is None:
        tiling, small_tiling = _LONG[limit]
        if queries >= _MANY_QUERIES:
            tiling = _MANY.get(limit, tiling)
        large, small = (AttentionVariant(width, **each._asdict(), **form) for each in (tiling, small_tiling))
    else:
        large, small = (
            AttentionVariant(width, keys=only_tile, stages=1, short=True, **each._asdict(), **form)
            for each in _SHORT[limit]
        )
    return large if large.fills(queries, heads, LARGE_TILES_SHARE) else small


def fills(width: int, queries: int, keys: int, heads: int) -> bool:
    """Returns whether the blocks of an attention leave few multiprocessors idle in their last wave."""
    return choose(width, queries, keys, heads).fills(queries, heads, _FULL)


# Channels, queries and keys of the attentions of Stable Diffusion 1.x and XL, and of other sizes with another tiling.
_SHAPES = [(40, 4096, 4096), (40, 4096, 77), (80, 1024, 1024), (80, 1024, 77), (160, 256, 256), (160, 256, 77)]
_SHAPES += [(160, 64, 64), (64, 4096, 4096), (64, 1024, 1024), (64, 1024, 77), (64, 64, 64), (40, 300, 300)]
_SHAPES += [(72, 4096, 4096), (72, 256, 256), (128, 4608, 4608), (128, 1024, 1024), (128, 256, 256)]
_SHAPES += [(40, 300, 77), (40, 4096, 64), (40, 300, 64), (80, 1024, 64)]
# The same of DiT, PixArt, Stable Diffusion 3.5 and FLUX, whose result is not always written as codes.
_FLOAT_SHAPES = [(72, 256, 256), (72, 4096, 4096), (64, 4429, 4429), (128, 4608, 4608)]


def variants() -> list[AttentionVariant]:
    """Lists the variants that the attentions of a Stable Diffusion denoiser compile, and those of all other tilings."""
    listed = [choose(*shape, heads) for shape in (*_SHAPES, *_FLOAT_SHAPES) for heads in (8, 16, 128)]
    listed += [choose(*shape, 32, False, bfloats) for shape in _FLOAT_SHAPES for bfloats in (False, True)]
    listed += [choose(width, 4096, 300, 32, codes, bias=True) for width in _BIASED for codes in (False, True)]
    return list(dict.fromkeys(listed))
