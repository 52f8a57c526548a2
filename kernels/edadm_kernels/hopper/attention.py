"""Decides which attentions the kernel of `attention.cu` computes and how it tiles them, and launches it."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
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
_NO_LIMIT = 1 << 30  # no query has a higher number
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
        short: Whether all keys fit into one turn, which is one iteration of the loop over keys.
        codes: Whether the kernel writes codes instead of floating-point values.
        bfloats: Whether operands and result are bfloat16 instead of float16.
        held: Whether queries are held in registers.
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
            "HELD": int(self.held),
            "BIAS": int(self.bias),
        }

    def prelude(self) -> str:
        """Returns the shared header, `multiply_scores` (`d (+)= a b^T`) and `multiply_values` (`d (+)= a b`)."""
        products = (("multiply_scores", self.keys, self.held, False), ("multiply_values", self.width, True, True))
        kind = "bf16" if self.bfloats else "f16"
        return "".join([source_text(HEADER), *(_instruction(*product, kind) for product in products)])

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


# Chosen by timings on an H200, and on an H100 for 72 and 128 channels. The key is the largest number of channels per
# head. Each value has the cut with large tiles of queries and the one with small tiles: (groups, keys per turn, stages,
# blocks, registers, held) for many keys, (groups, blocks, registers) for keys that fit into one turn.
_Cut = tuple[int, int, int, int, int, bool]
_LONG: dict[int, tuple[_Cut, _Cut]] = {
    40: ((4, 64, 3, 1, 0, False), (2, 64, 3, 2, 0, False)),
    64: ((4, 64, 3, 1, 112, False), (1, 64, 3, 3, 0, False)),
    72: ((4, 64, 3, 1, 112, False), (2, 128, 2, 1, 240, False)),
    88: ((3, 96, 2, 1, 160, False), (2, 128, 2, 1, 0, False)),
    112: ((2, 64, 2, 1, 0, False), (1, 64, 2, 1, 0, False)),
    128: ((2, 128, 2, 1, 240, False), (1, 64, 2, 1, 0, False)),
    MAX_WIDTH: ((2, 64, 2, 1, 0, False), (1, 64, 2, 1, 0, False)),
}
# The cut with large tiles from `_MANY_QUERIES` on, where it differs.
_MANY: dict[int, _Cut] = {64: (3, 128, 2, 1, 160, False), 128: (2, 128, 2, 1, 240, True)}
_MANY_QUERIES = 4096
# The only cut of each number of channels with a number per key, for which registers are scarce.
_BIASED: dict[int, _Cut] = {64: (4, 64, 3, 1, 112, False), 72: (4, 64, 3, 1, 112, False)}
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
    turn = next((most for most in _FEW_KEYS if keys <= most), None)
    if bias:
        return _variant(width, _BIASED[width], **form)
    if turn is None:
        cut, small_cut = _LONG[limit]
        if queries >= _MANY_QUERIES:
            cut = _MANY.get(limit, cut)
        large, small = _variant(width, cut, **form), _variant(width, small_cut, **form)
    else:
        large, small = (
            AttentionVariant(width, groups, turn, 1, blocks, registers, short=True, **form)
            for groups, blocks, registers in _SHORT[limit]
        )
    room = _MULTIPROCESSORS * large.blocks
    tiles = heads * -(-queries // large.rows)
    return large if tiles >= _FILLED * room * -(-tiles // room) else small


def _variant(width: int, cut: _Cut, **form: bool) -> AttentionVariant:
    return AttentionVariant(width, *cut[:5], held=cut[5], **form)


def fills(width: int, queries: int, keys: int, heads: int) -> bool:
    """Returns whether the blocks of an attention leave few multiprocessors idle in their last wave."""
    variant = choose(width, queries, keys, heads)
    slots, blocks = _MULTIPROCESSORS * variant.blocks, heads * -(-queries // variant.rows)
    return blocks >= _FULL * slots * -(-blocks // slots)


def takes(q: Tensor, k: Tensor, v: Tensor, scale: float, codes: bool = True, bias: Tensor | None = None) -> bool:
    """Returns whether `launch_attention` supports `q [N, heads, T, d]`, `k` and `v [N, heads, S, d]`.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        scale: Factor of the scores.
        codes: Whether the kernel writes codes; the operands must then be float16, otherwise they may also be bfloat16.
        bias: What is added to the scores of each key, `[N, heads, S]`; it is read in pairs.
    """
    width = q.shape[3]
    if k.shape != (*q.shape[:2], k.shape[2], width) or v.shape != k.shape:
        return False
    others = (k, v) if bias is None else (k, v, bias)
    if any(x.dtype != q.dtype or x.device != q.device for x in others):
        return False
    if bias is not None and (width not in _BIASED or not _is_read_in_pairs(bias, k.shape[:3])):
        return False
    types = (torch.float16,) if codes else (torch.float16, torch.bfloat16)
    sizes = width % 8 == 0 and width <= MAX_WIDTH and scale > 0
    return q.dtype in types and sizes and all(_is_copied(x) for x in (q, k, v))


def _is_read_in_pairs(bias: Tensor, shape: torch.Size) -> bool:
    """Returns whether a number per key has the shape `[N, heads, S]`, and pairs of keys can be read from it."""
    if bias.shape != shape or bias.stride(2) != 1:
        return False
    return not any(step % 2 for step in (*bias.stride()[:2], shape[2], bias.data_ptr() // bias.element_size()))


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
_SHAPES += [(72, 4096, 4096), (72, 256, 256), (128, 4608, 4608), (128, 1024, 1024), (128, 256, 256)]
_SHAPES += [(40, 300, 77), (40, 4096, 64), (40, 300, 64), (80, 1024, 64)]
# The same of DiT, PixArt, Stable Diffusion 3.5 and FLUX, whose result is not always written as codes.
_FLOAT_SHAPES = [(72, 256, 256), (72, 4096, 4096), (64, 4429, 4429), (128, 4608, 4608)]


def variants() -> list[AttentionVariant]:
    """Lists the variants that the attentions of a Stable Diffusion denoiser compile, and those of all other cuts."""
    listed = [choose(*shape, heads) for shape in (*_SHAPES, *_FLOAT_SHAPES) for heads in (8, 16, 128)]
    listed += [choose(*shape, 32, False, bfloats) for shape in _FLOAT_SHAPES for bfloats in (False, True)]
    listed += [choose(width, 4096, 300, 32, codes, bias=True) for width in _BIASED for codes in (False, True)]
    return list(dict.fromkeys(listed))


def _instruction(name: str, columns: int, held: bool, strided: bool, kind: str) -> str:
    """Returns the source of a function for 64 rows, `columns` columns and 16 products per sum.

    The function overwrites `d` where `accumulate` is false. The left operand is in registers if it is `held`, otherwise
    in shared memory. The terms of a sum are contiguous in the right operand, or `strided` as in values.
    """
    count = columns // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    if held:
        parameter, left = "const u32* a", "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}"
        inputs, used, flags = ", ".join(f'"r"(a[{i}])' for i in range(4)), 4, f"1, 1, {int(strided)}"
    else:
        parameter, left, inputs, used, flags = "u64 a", f"%{count}", '"l"(a)', 1, f"1, 1, 0, {int(strided)}"
    return (
        f"__device__ __forceinline__ void {name}(float (&d)[{count}], {parameter}, u64 b, bool accumulate) {{\n"
        f'    asm volatile("{{\\n.reg .pred more;\\nsetp.ne.b32 more, %{count + used + 1}, 0;\\n'
        f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} {{{registers}}}, {left}, %{count + used}, "
        f'more, {flags};\\n}}" : {outputs} : {inputs}, "l"(b), "r"(static_cast<int>(accumulate)));\n}}\n'
    )


class _Output(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("scale", "zero_point", "shift", "values")),
        ("quant_max", ctypes.c_float),
    )


class _Problem(ctypes.Structure):
    _fields_ = (
        ("outputs", _Output * 2),
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("queries", "keys", "heads", "tiles", "parts", "first")),
        *((name, ctypes.c_int) for name in ("bias_of_sample", "bias_of_head")),
        ("scale", ctypes.c_float),
    )


@dataclass(frozen=True, eq=False)
class Grid:
    """The grid of the codes that a kernel writes.

    Args:
        scale: The scale, float32, one element; with a shift its inverse.
        zero_point: The zero-point of unsigned codes, int32, one element.
        shift: The zero-point of signed codes, float32, one element, in place of `zero_point`.
        bits: Bits of a code.
    """

    scale: Tensor
    zero_point: Tensor | None
    shift: Tensor | None = None
    bits: int = 8


def launch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    outs: Sequence[Tensor],
    grids: Sequence[Grid] = (),
    bias: Tensor | None = None,
    variant: AttentionVariant | None = None,
) -> None:
    """Fills `outs` with the attention of operands that `takes` accepts.

    Args:
        q: Queries `[N, heads, T, d]`.
        k: Keys `[N, heads, S, d]`.
        v: Values `[N, heads, S, d]`.
        scale: Factor of the scores.
        outs: `[N, T, heads * d]`, contiguous: codes, or values in the type of `q`. With two of them the second has the
            queries after those of the first.
        grids: The grid of each output's codes; empty where outputs are not codes.
        bias: What is added to the scores of each key, `[N, heads, S]` in the type of `q`, contiguous along keys; S is
            even.
        variant: The variant; by default the sizes decide.
    """
    samples, heads, queries, width = q.shape
    keys = k.shape[2]
    if variant is None:
        variant = choose(
            width, queries, keys, samples * heads, bool(grids), q.dtype == torch.bfloat16, bias is not None
        )
    tiles = -(-queries // variant.rows)
    blocks = _MULTIPROCESSORS * variant.blocks // (samples * heads)
    parts = min(tiles, max(1, blocks)) if variant.short else tiles
    first = outs[0].shape[1] if len(outs) > 1 else _NO_LIMIT
    problem = _Problem(
        queries=queries, keys=keys, heads=heads, tiles=tiles, parts=parts, first=first, scale=scale * math.log2(math.e)
    )
    if bias is not None:
        problem.bias, problem.bias_of_sample, problem.bias_of_head = bias.data_ptr(), bias.stride(0), bias.stride(1)
    for place, out in enumerate(outs):
        problem.outputs[place].values = out.data_ptr()
    for place, grid in enumerate(grids):
        output = problem.outputs[place]
        output.scale, output.quant_max = grid.scale.data_ptr(), float((1 << grid.bits) - 1)
        output.zero_point = None if grid.zero_point is None else grid.zero_point.data_ptr()
        output.shift = None if grid.shift is None else grid.shift.data_ptr()
    maps = [_map(x, rows) for x, rows in ((q, variant.rows), (k, variant.keys), (v, variant.keys))]
    launch(variant, parts * heads * samples, [*maps, problem], q.device.index or 0)


def _map(x: Tensor, rows: int) -> object:
    """Returns the tensor map of 16-bit `[samples, heads, tokens, d]`; one copy is 64 channels by `rows` tokens."""
    samples, heads, tokens, width = x.shape
    strides = tuple(2 * step for step in _steps(x))
    return tensor_map(
        x.data_ptr(), (2 * width, heads, tokens, samples), (_ROW_BYTES, 1, rows, 1), _ROW_BYTES, strides=strides
    )
