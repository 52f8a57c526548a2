"""Which attentions the kernel of `attention.cu` takes, how it cuts them, and its launch."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from edadm_kernels.hopper.driver import launch, tensor_map

MAX_WIDTH = 160  # channels of a head; wider ones leave no room for their sums
_MULTIPROCESSORS = 132
_ROW_BYTES = 128  # a swizzled row of 64 channels
_ALIGNMENT = 16  # bytes of an address, and of a row of tokens, that the copies want
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
    """

    width: int
    groups: int
    keys: int
    stages: int
    blocks: int = 1
    registers: int = 0
    short: bool = False

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
        """Queries, keys and values of every stage, two barriers each, and the codes."""
        tiles = 2 if self.short else 1
        operands = -(-self.width // 64) * _ROW_BYTES * (tiles * self.rows + 2 * self.stages * self.keys)
        return operands + 16 * tiles + 32 * self.stages + self.rows * self.width

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
        }

    def prelude(self) -> str:
        """`multiply_scores`: `d (+)= a b^T`, both in shared memory; `multiply_values`: `d (+)= a b`, a in registers."""
        return _instruction("multiply_scores", self.keys, False) + _instruction("multiply_values", self.width, True)

    def label(self) -> str:
        """For tables."""
        extras = f"-x{self.blocks}" if self.blocks > 1 else ""
        return f"attention-{self.width}-{self.rows}x{self.keys}{extras}" + "-short" * self.short


# As timed on an H200. For heads of at most so many channels: how many keys are cut into large tiles of queries and into
# small ones (groups, keys a turn, stages, blocks, registers), and how few are (groups, blocks, registers).
_LONG: dict[int, tuple[tuple[int, int, int, int, int], tuple[int, int, int, int, int]]] = {
    40: ((4, 64, 3, 1, 0), (2, 64, 3, 2, 0)),
    64: ((4, 64, 3, 1, 112), (1, 64, 3, 3, 0)),
    88: ((3, 96, 2, 1, 160), (2, 128, 2, 1, 0)),
    MAX_WIDTH: ((2, 64, 2, 1, 0), (1, 64, 2, 1, 0)),
}
_SHORT: dict[int, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    40: ((4, 1, 112), (1, 3, 0)),
    64: ((1, 3, 0), (1, 3, 0)),
    88: ((1, 2, 0), (1, 2, 0)),
    MAX_WIDTH: ((1, 1, 0), (1, 1, 0)),
}
_FEW_KEYS = (64, 80)  # a turn that holds them all


@lru_cache(maxsize=1024)
def choose(width: int, queries: int, keys: int, heads: int) -> AttentionVariant:
    """How an attention is cut; nothing but the sizes decides.

    Args:
        width: Channels of a head, at most `MAX_WIDTH`.
        queries: A sample.
        keys: A sample.
        heads: Of all samples.
    """
    limit = min(most for most in _LONG if width <= most)
    turn = next((most for most in _FEW_KEYS if keys <= most), None)
    if turn is None:
        large, small = (AttentionVariant(width, *cut) for cut in _LONG[limit])
    else:
        large, small = (
            AttentionVariant(width, groups, turn, 1, blocks, registers, short=True)
            for groups, blocks, registers in _SHORT[limit]
        )
    room = _MULTIPROCESSORS * large.blocks
    tiles = heads * -(-queries // large.rows)
    return large if tiles >= _FILLED * room * -(-tiles // room) else small


def takes(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> bool:
    """Whether `launch_attention` serves these operands; shapes and layouts are those of `attention_quantize`."""
    width = q.shape[2] // heads
    aligned = all(x.data_ptr() % _ALIGNMENT == 0 and 2 * x.stride(1) % _ALIGNMENT == 0 for x in (q, k, v))
    apart = all(x.stride(1) >= x.shape[2] for x in (q, k, v))  # which a single token need not have
    return q.dtype == torch.float16 and aligned and apart and width % 8 == 0 and width <= MAX_WIDTH and scale > 0


# Channels, queries and keys of the attentions of Stable Diffusion 1.x and XL, and of what else has a cut of its own.
_SHAPES = [(40, 4096, 4096), (40, 4096, 77), (80, 1024, 1024), (80, 1024, 77), (160, 256, 256), (160, 256, 77)]
_SHAPES += [(160, 64, 64), (64, 4096, 4096), (64, 1024, 1024), (64, 1024, 77), (64, 64, 64), (40, 300, 300)]
_SHAPES += [(40, 300, 77), (40, 4096, 64), (40, 300, 64), (80, 1024, 64)]


def variants() -> list[AttentionVariant]:
    """What the attentions of a Stable Diffusion denoiser compile, and every other cut there is."""
    return list(dict.fromkeys(choose(*shape, heads) for shape in _SHAPES for heads in (8, 16, 128)))


def _instruction(name: str, columns: int, values: bool) -> str:
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
        f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.f16.f16 {{{registers}}}, {left}, %{count + used}, more, "
        f'{flags};\\n}}" : {outputs} : {inputs}, "l"(b), "r"(static_cast<int>(accumulate)));\n}}\n'
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
    heads: int,
    scale: float,
    out: Tensor,
    out_scale: Tensor,
    out_zero_point: Tensor,
    num_bits: int,
) -> None:
    """Fill `out`; the arguments are those of `attention_quantize`, already checked and taken.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        heads: Number of heads.
        scale: Of the scores.
        out: Codes.
        out_scale: One element.
        out_zero_point: One element.
        num_bits: Of the codes.
    """
    samples, queries = q.shape[:2]
    variant = choose(q.shape[2] // heads, queries, k.shape[1], samples * heads)
    tiles = -(-queries // variant.rows)
    room = _MULTIPROCESSORS * variant.blocks // (samples * heads)
    parts = min(tiles, max(1, room)) if variant.short else tiles
    problem = _Problem(
        out_scale.data_ptr(), out_zero_point.data_ptr(), out.data_ptr(),
        queries, k.shape[1], heads, tiles, parts, scale * math.log2(math.e), float((1 << num_bits) - 1),
    )  # fmt: skip
    maps = [_map(x, heads, rows) for x, rows in ((q, variant.rows), (k, variant.keys), (v, variant.keys))]
    launch(variant, parts * heads * samples, [*maps, problem], q.device.index or 0)


def _map(x: Tensor, heads: int, rows: int) -> object:
    """Of `[samples, tokens, heads, channels]` in float16, copied by 64 channels of some tokens of a head."""
    samples, tokens, channels = x.shape
    width, row = 2 * channels // heads, 2 * x.stride(1)
    sizes, strides = (width, heads, tokens, samples), (width, row, tokens * row)
    return tensor_map(x.data_ptr(), sizes, (_ROW_BYTES, 1, rows, 1), _ROW_BYTES, strides=strides)
