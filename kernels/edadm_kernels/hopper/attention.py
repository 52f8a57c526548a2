"""Which attentions the kernel of `attention.cu` takes, how it cuts them, and its launch."""

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
MAX_WIDTH = 160  # channels of a head; wider ones leave no room for their sums
_MULTIPROCESSORS = 132
_ROW_BYTES = 128  # a swizzled row of 64 channels
_ALIGNMENT = 16  # bytes of an address, and of a row of tokens, that the copies want
_FULL = 0.9  # share of the last waves that are at work
_FILLED = 0.8  # share of the multiprocessors that large tiles are to keep busy


@dataclass(frozen=True)
class AttentionVariant:
    """Compile-time parameters of `attention.cu`.

    Args:
        width: Channels of a head, a multiple of 8.
        groups: Of four warps, 64 queries each; 1 to 4.
        keys: A turn, a multiple of 16 up to 256.
        stages: Turns whose keys and values are in shared memory.
        blocks: A multiprocessor.
        registers: Of a thread that multiplies; 0: those it starts with.
        short: All keys fit a turn.
        codes: Codes are written, not what they are rounded from.
        bfloats: Operands and result are bfloat16, not float16.
    """

    width: int
    groups: int
    keys: int
    stages: int
    blocks: int = 1
    registers: int = 0
    short: bool = False
    codes: bool = True
    bfloats: bool = False

    source = "attention.cu"
    name = "attention"
    cluster = 1

    @property
    def threads(self) -> int:
        """A block: the warps that multiply, and one that copies or, where it gives up registers, four."""
        return self.groups * 128 + (128 if self.registers else 32)

    @property
    def rows(self) -> int:
        """Queries a tile."""
        return 64 * self.groups

    @property
    def shared_bytes(self) -> int:
        """Queries, keys and values of every stage, two barriers each, and the result."""
        tiles = 2 if self.short else 1
        operands = -(-self.width // 64) * _ROW_BYTES * (tiles * self.rows + 2 * self.stages * self.keys)
        return operands + 16 * tiles + 32 * self.stages + 16 + self.rows * self.width * (1 if self.codes else 2)

    def defines(self) -> dict[str, int]:
        """Macros of the source."""
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
        """What attentions share, and `multiply_scores`, `d (+)= a b^T`, and `multiply_values`, `d (+)= a b`."""
        products = (("multiply_scores", self.keys, False), ("multiply_values", self.width, True))
        kind = "bf16" if self.bfloats else "f16"
        return "".join([source_text(HEADER), *(_instruction(*product, kind) for product in products)])

    def label(self) -> str:
        """For tables."""
        extras = f"-x{self.blocks}" if self.blocks > 1 else ""
        extras += "-short" * self.short + ("" if self.codes else "-bf16" if self.bfloats else "-f16")
        return f"attention-{self.width}-{self.rows}x{self.keys}{extras}"


# As timed on an H200, and on an H100 for 72 and 128 channels. For heads of at most so many channels: how many keys are
# cut into large tiles of queries and into small ones (groups, keys a turn, stages, blocks, registers), and how few are
# (groups, blocks, registers).
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
_FEW_KEYS = (64, 80)  # a turn that holds them all


@lru_cache(maxsize=1024)
def choose(
    width: int, queries: int, keys: int, heads: int, codes: bool = True, bfloats: bool = False
) -> AttentionVariant:
    """How an attention is cut; nothing but the sizes decides.

    Args:
        width: Channels of a head, at most `MAX_WIDTH`.
        queries: A sample.
        keys: A sample.
        heads: Of all samples.
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
    """Whether the blocks of an attention leave few multiprocessors idle in their last wave."""
    variant = choose(width, queries, keys, heads)
    slots, blocks = _MULTIPROCESSORS * variant.blocks, heads * -(-queries // variant.rows)
    return blocks >= _FULL * slots * -(-blocks // slots)


def takes(q: Tensor, k: Tensor, v: Tensor, scale: float, codes: bool = True) -> bool:
    """Whether `launch_attention` serves `q [N, heads, T, d]`, `k` and `v [N, heads, S, d]`.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        scale: Of the scores.
        codes: Whether codes are to be written; then the operands are float16, and otherwise bfloat16 too.
    """
    width = q.shape[3]
    types = (torch.float16,) if codes else (torch.float16, torch.bfloat16)
    sizes = width % 8 == 0 and width <= MAX_WIDTH and scale > 0
    return q.dtype in types and sizes and all(_is_copied(x) for x in (q, k, v))


def _is_copied(x: Tensor) -> bool:
    """Whether the copies take the layout of `[N, heads, tokens, d]`; a single token or head may have any stride."""
    is_aligned = all(2 * step % _ALIGNMENT == 0 for step in _steps(x)) and x.data_ptr() % _ALIGNMENT == 0
    return is_aligned and x.stride(3) == 1 and all(step >= x.shape[3] for step in _steps(x))


def _steps(x: Tensor) -> tuple[int, int, int]:
    """Elements from a head, a token and a sample of `[N, heads, tokens, d]` to the next."""
    samples, heads, tokens, width = x.shape
    token = x.stride(2) if tokens > 1 else heads * width
    head = x.stride(1) if heads > 1 else width
    return head, token, x.stride(0) if samples > 1 else max(tokens * token, heads * head)


# Channels, queries and keys of the attentions of Stable Diffusion 1.x and XL, and of what else has a cut of its own.
_SHAPES = [(40, 4096, 4096), (40, 4096, 77), (80, 1024, 1024), (80, 1024, 77), (160, 256, 256), (160, 256, 77)]
_SHAPES += [(160, 64, 64), (64, 4096, 4096), (64, 1024, 1024), (64, 1024, 77), (64, 64, 64), (40, 300, 300)]
_SHAPES += [(72, 4096, 4096), (72, 256, 256), (128, 4608, 4608), (128, 256, 256)]
_SHAPES += [(40, 300, 77), (40, 4096, 64), (40, 300, 64), (80, 1024, 64)]
# Of DiT, PixArt, Stable Diffusion 3.5 and FLUX, whose result is not written as codes.
_FLOAT_SHAPES = [(72, 256, 256), (72, 4096, 4096), (64, 4429, 4429), (128, 4608, 4608)]


def variants() -> list[AttentionVariant]:
    """What the attentions of a Stable Diffusion denoiser compile, and every other cut there is."""
    listed = [choose(*shape, heads) for shape in _SHAPES for heads in (8, 16, 128)]
    listed += [choose(*shape, 32, False, bfloats) for shape in _FLOAT_SHAPES for bfloats in (False, True)]
    return list(dict.fromkeys(listed))


def _instruction(name: str, columns: int, values: bool, kind: str) -> str:
    """A function of 64 rows, `columns` columns and 16 products; `accumulate` false overwrites.

    Of values the left operand comes from registers, and what a sum goes over lies apart in the right one; of scores
    both lie in shared memory, what a sum goes over side by side.
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
    """Fill `out`; the operands are taken.

    Args:
        q: Queries `[N, heads, T, d]`.
        k: Keys `[N, heads, S, d]`.
        v: Values `[N, heads, S, d]`.
        scale: Of the scores.
        out: `[N, T, heads * d]`, contiguous: codes, or the type of `q`.
        quantizer: Scale, zero-point and bits of the codes.
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
    """Of `[samples, heads, tokens, d]` in 16 bits, copied by 64 channels of some tokens of a head."""
    samples, heads, tokens, width = x.shape
    strides = tuple(2 * step for step in _steps(x))
    return tensor_map(
        x.data_ptr(), (2 * width, heads, tokens, samples), (_ROW_BYTES, 1, rows, 1), _ROW_BYTES, strides=strides
    )
