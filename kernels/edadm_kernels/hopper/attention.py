"""Decides which attentions the kernel of `attention.cu` computes and how it tiles them, and launches it."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from edadm_kernels.hopper.compilation import source_text
from edadm_kernels.hopper.driver import launch, tensor_map

HEADER = "attention.cuh"
MAX_WIDTH = 160  # channels per head; the sums of a wider head do not fit
_MULTIPROCESSORS = 132
_ROW_BYTES = 128  # a swizzled row of 64 channels
_ALIGNMENT = 16  # addresses and rows of tokens must be multiples of this many bytes to be copied
_FULL = 0.9  # share of the last waves that are at work
_FILLED = 0.8  # share of the multiprocessors that large tiles are to keep busy


@dataclass(frozen=True)
class AttentionTile:
    """Compile-time parameters that both attention kernels have.

    Args:
        width: Channels per head, a multiple of 8.
        groups: Number of groups of four warps, 1 to 4; each group computes 64 queries.
        keys: Keys per turn.
        stages: Number of turns whose keys and values are in shared memory at once.
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
        """Returns the queries per tile."""
        return 64 * self.groups


@dataclass(frozen=True)
class AttentionVariant(AttentionTile):
    """Compile-time parameters of `attention.cu`; `keys` is a multiple of 16 up to 256.

    Args:
        short: Whether all keys fit into one turn.
        codes: Whether the kernel writes codes instead of the values that they are rounded from.
        bfloats: Whether operands and result are bfloat16 instead of float16.
    """

    short: bool = False
    codes: bool = True
    bfloats: bool = False

    source = "attention.cu"
    name = "attention"

    @property
    def shared_bytes(self) -> int:
        """Returns bytes for queries, for every stage's keys and values with two barriers each, and for the result."""
        tiles = 2 if self.short else 1
        operands = -(-self.width // 64) * _ROW_BYTES * (tiles * self.rows + 2 * self.stages * self.keys)
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
        }

    def prelude(self) -> str:
        """Returns the shared header, `multiply_scores` (`d (+)= a b^T`) and `multiply_values` (`d (+)= a b`)."""
        products = (("multiply_scores", self.keys, False), ("multiply_values", self.width, True))
        kind = "bf16" if self.bfloats else "f16"
        return "".join([source_text(HEADER), *(_instruction(*product, kind) for product in products)])

    def label(self) -> str:
        """Returns the name of the variant for tables."""
        extras = f"-x{self.blocks}" if self.blocks > 1 else ""
        extras += "-short" * self.short + ("" if self.codes else "-bf16" if self.bfloats else "-f16")
        return f"attention-{self.width}-{self.rows}x{self.keys}{extras}"


# Chosen by timings on an H200, and on an H100 for 72 and 128 channels. The key is the largest number of channels per
# head. Each value has the cut with large tiles of queries and the one with small tiles: (groups, keys per turn, stages,
# blocks, registers) for many keys, (groups, blocks, registers) for keys that fit into one turn.
_LONG: dict[int, tuple[tuple[int, int, int, int, int], tuple[int, int, int, int, int]]] = {
    40: ((4, 64, 3, 1, 0), (2, 64, 3, 2, 0)),
    64: ((4, 64, 3, 1, 112), (1, 64, 3, 3, 0)),
    72: ((4, 64, 3, 1, 112), (2, 128, 2, 1, 240)),
    88: ((3, 96, 2, 1, 160), (2, 128, 2, 1, 0)),
    112: ((2, 64, 2, 1, 0), (1, 64, 2, 1, 0)),
    128: ((2, 128, 2, 1, 240), (1, 64, 2, 1, 0)),
    MAX_WIDTH: ((2, 64, 2, 1, 0), (1, 64, 2, 1, 0)),
}
_SHORT: dict[int, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    40: ((4, 1, 112), (1, 3, 0)),
    64: ((1, 3, 0), (1, 3, 0)),
    72: ((1, 2, 0), (1, 2, 0)),
    88: ((1, 2, 0), (1, 2, 0)),
    112: ((1, 1, 0), (1, 1, 0)),
    128: ((1, 1, 0), (1, 1, 0)),
    MAX_WIDTH: ((1, 1, 0), (1, 1, 0)),
}
_FEW_KEYS = (64, 80)  # sizes of a turn that holds all keys


@lru_cache(maxsize=1024)
def choose(
    width: int, queries: int, keys: int, heads: int, codes: bool = True, bfloats: bool = False
) -> AttentionVariant:
    """Returns the variant that computes an attention; only the sizes and types decide.

    Args:
        width: Channels per head, at most `MAX_WIDTH`.
        queries: Queries per sample.
        keys: Keys per sample.
        heads: Total number of heads of all samples.
        codes: As in `AttentionVariant`.
        bfloats: As in `AttentionVariant`.
    """
    limit = min(most for most in _LONG if width <= most)
    turn = next((most for most in _FEW_KEYS if keys <= most), None)
    if turn is None:
        large, small = (AttentionVariant(width, *cut, codes=codes, bfloats=bfloats) for cut in _LONG[limit])
    else:
        large, small = (
            AttentionVariant(width, groups, turn, 1, blocks, registers, short=True, codes=codes, bfloats=bfloats)
            for groups, blocks, registers in _SHORT[limit]
        )
    room = _MULTIPROCESSORS * large.blocks
    tiles = heads * -(-queries // large.rows)
    return large if tiles >= _FILLED * room * -(-tiles // room) else small


def fills(width: int, queries: int, keys: int, heads: int) -> bool:
    """Returns whether the blocks of an attention leave few multiprocessors idle in their last wave."""
    variant = choose(width, queries, keys, heads)
    slots, blocks = _MULTIPROCESSORS * variant.blocks, heads * -(-queries // variant.rows)
    return blocks >= _FULL * slots * -(-blocks // slots)


def takes(q: Tensor, k: Tensor, v: Tensor, scale: float, codes: bool = True) -> bool:
    """Returns whether `launch_attention` supports `q [N, heads, T, d]`, `k` and `v [N, heads, S, d]`.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        scale: Factor of the scores.
        codes: Whether the kernel writes codes; the operands must then be float16, otherwise they may also be bfloat16.
    """
    width = q.shape[3]
    types = (torch.float16,) if codes else (torch.float16, torch.bfloat16)
    sizes = width % 8 == 0 and width <= MAX_WIDTH and scale > 0
    return q.dtype in types and sizes and all(_is_copied(x) for x in (q, k, v))


def _is_copied(x: Tensor) -> bool:
    """Returns whether `[N, heads, tokens, d]` can be copied; a single token or head may have any stride."""
    is_aligned = all(2 * step % _ALIGNMENT == 0 for step in _steps(x)) and x.data_ptr() % _ALIGNMENT == 0
    return is_aligned and x.stride(3) == 1 and all(step >= x.shape[3] for step in _steps(x))


def _steps(x: Tensor) -> tuple[int, int, int]:
    """Returns the strides of heads, tokens and samples of `[N, heads, tokens, d]`, in elements."""
    samples, heads, tokens, width = x.shape
    token = x.stride(2) if tokens > 1 else heads * width
    head = x.stride(1) if heads > 1 else width
    return head, token, x.stride(0) if samples > 1 else max(tokens * token, heads * head)


# Channels, queries and keys of the attentions of Stable Diffusion 1.x and XL, and of other sizes with a separate cut.
_SHAPES = [(40, 4096, 4096), (40, 4096, 77), (80, 1024, 1024), (80, 1024, 77), (160, 256, 256), (160, 256, 77)]
_SHAPES += [(160, 64, 64), (64, 4096, 4096), (64, 1024, 1024), (64, 1024, 77), (64, 64, 64), (40, 300, 300)]
_SHAPES += [(72, 4096, 4096), (72, 256, 256), (128, 4608, 4608), (128, 256, 256)]
_SHAPES += [(40, 300, 77), (40, 4096, 64), (40, 300, 64), (80, 1024, 64)]
# The same of DiT, PixArt, Stable Diffusion 3.5 and FLUX, whose result is not written as codes.
_FLOAT_SHAPES = [(72, 256, 256), (72, 4096, 4096), (64, 4429, 4429), (128, 4608, 4608)]


def variants() -> list[AttentionVariant]:
    """Lists the variants that the attentions of a Stable Diffusion denoiser compile, and those of all other cuts."""
    listed = [choose(*shape, heads) for shape in _SHAPES for heads in (8, 16, 128)]
    listed += [choose(*shape, 32, False, bfloats) for shape in _FLOAT_SHAPES for bfloats in (False, True)]
    return list(dict.fromkeys(listed))


def _instruction(name: str, columns: int, values: bool, kind: str) -> str:
    """Returns the source of a function for 64 rows, `columns` columns and 16 products per sum.

    The function overwrites `d` where `accumulate` is false. For values, the left operand is in registers and the terms
    of a sum are strided in the right operand. For scores, both operands are in shared memory and the terms of a sum are
    contiguous.
    """
    count = columns // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    if values:
        parameter, left = "const u32* a", "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}"
        inputs, used, flags = ", ".join(f'"r"(a[{i}])' for i in range(4)), 4, "1, 1, 1"
    else:
        parameter, left, inputs, used, flags = "u64 a", f"%{count}", '"l"(a)', 1, "1, 1, 0, 0"
    return (
        f"__device__ __forceinline__ void {name}(float (&d)[{count}], {parameter}, u64 b, bool accumulate) {{\n"
        f'    asm volatile("{{\\n.reg .pred more;\\nsetp.ne.b32 more, %{count + used + 1}, 0;\\n'
        f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} {{{registers}}}, {left}, %{count + used}, "
        f'more, {flags};\\n}}" : {outputs} : {inputs}, "l"(b), "r"(static_cast<int>(accumulate)));\n}}\n'
    )


class _Problem(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out_scale", "out_zero_point", "out")),
        *((name, ctypes.c_int) for name in ("queries", "keys", "heads", "tiles", "parts")),
        ("scale", ctypes.c_float),
        ("quant_max", ctypes.c_float),
    )


def launch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    out: Tensor,
    quantizer: tuple[Tensor, Tensor, int] | None = None,
) -> None:
    """Fills `out` with the attention of operands that `takes` accepts.

    Args:
        q: Queries `[N, heads, T, d]`.
        k: Keys `[N, heads, S, d]`.
        v: Values `[N, heads, S, d]`.
        scale: Factor of the scores.
        out: `[N, T, heads * d]`, contiguous: codes, or values in the type of `q`.
        quantizer: Scale, zero-point and bits of the codes; `None` where `out` is not codes.
    """
    samples, heads, queries, width = q.shape
    keys = k.shape[2]
    variant = choose(width, queries, keys, samples * heads, quantizer is not None, q.dtype == torch.bfloat16)
    tiles = -(-queries // variant.rows)
    blocks = _MULTIPROCESSORS * variant.blocks // (samples * heads)
    parts = min(tiles, max(1, blocks)) if variant.short else tiles
    out_scale, out_zero_point, bits = quantizer or (out, out, 8)
    problem = _Problem(
        out_scale.data_ptr(), out_zero_point.data_ptr(), out.data_ptr(),
        queries, keys, heads, tiles, parts, scale * math.log2(math.e), float((1 << bits) - 1),
    )  # fmt: skip
    maps = [_map(x, rows) for x, rows in ((q, variant.rows), (k, variant.keys), (v, variant.keys))]
    launch(variant, parts * heads * samples, [*maps, problem], q.device.index or 0)


def _map(x: Tensor, rows: int) -> object:
    """Returns the tensor map of 16-bit `[samples, heads, tokens, d]`; one copy is 64 channels by `rows` tokens."""
    samples, heads, tokens, width = x.shape
    strides = tuple(2 * step for step in _steps(x))
    return tensor_map(
        x.data_ptr(), (2 * width, heads, tokens, samples), (_ROW_BYTES, 1, rows, 1), _ROW_BYTES, strides=strides
    )
