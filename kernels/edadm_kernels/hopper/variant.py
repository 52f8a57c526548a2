"""Describes what a kernel in CUDA C++ is compiled and launched with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from edadm_kernels.hopper.instruction import wgmma


class Variant(Protocol):
    """A kernel with its compile-time parameters; hashable, so that each is compiled once."""

    @property
    def source(self) -> str:
        """Returns the name of the source file."""

    @property
    def name(self) -> str:
        """Returns the name of the kernel in that file."""

    @property
    def threads(self) -> int:
        """Returns the threads per block."""

    @property
    def shared_bytes(self) -> int:
        """Returns the bytes of dynamic shared memory per block."""

    @property
    def cluster(self) -> int:
        """Returns the number of blocks per cluster."""

    def defines(self) -> dict[str, int]:
        """Returns the macros that the source is compiled with."""

    def prelude(self) -> str:
        """Returns the text that stands before the source."""

    def label(self) -> str:
        """Returns the name for tables, which is unique in the package."""

    def __hash__(self) -> int:
        """Returns a hash: equal variants are compiled once."""


@dataclass(frozen=True)
class ProductTile:
    """Compile-time parameters of `product.cu`.

    Args:
        bm: Output pixels per block, a multiple of 64 times `groups`.
        bn: Output channels per block, the columns of a matrix instruction: a multiple of 16 up to 256.
        bk: Channels per step, 64 or 128.
        stages: Number of steps whose operands are in shared memory at once.
        split: Number of blocks (one cluster) that share a sum: 1, 2, 4 or 8.
        groups: Number of groups of four warps that multiply.
        blocks: Blocks per multiprocessor.
        geglu: Whether the output is gated and written as codes.
        gates_last: Whether a gated product reads weights whose gates follow all values, in place of alternating rows.
        codes: Whether the codes of the float16 output are written in its place.
        convolution: Whether it is a convolution, with pixels in boxes and taps outside the image, or a matrix product.
        upsample: Whether the image is first enlarged by a factor of two with nearest neighbour.
        floats: Whether float32 is written; nothing is added to it.
        bfloats: Whether bfloat16 is written; nothing is added to it.
    """

    bm: int
    bn: int
    bk: int
    stages: int
    split: int = 1
    groups: int = 2
    blocks: int = 1
    geglu: bool = False
    gates_last: bool = False
    codes: bool = False
    convolution: bool = False
    upsample: bool = False
    floats: bool = False
    bfloats: bool = False

    source = "product.cu"
    name = "product"

    @property
    def threads(self) -> int:
        """Returns the threads per block: of the warps that multiply and one that copies."""
        return self.groups * 128 + 32

    @property
    def shared_bytes(self) -> int:
        """Returns the bytes for the operands of every stage, with two barriers each."""
        return self.stages * ((self.bm + self.bn) * self.bk + 16)

    @property
    def cluster(self) -> int:
        """Returns the number of blocks that share a sum."""
        return self.split

    def defines(self) -> dict[str, int]:
        """Returns the macros that the source is compiled with."""
        return {
            "BM": self.bm,
            "BN": self.bn,
            "BK": self.bk,
            "STAGES": self.stages,
            "SPLIT": self.split,
            "CONSUMERS": self.groups,
            "BLOCKS": self.blocks,
            "GEGLU": int(self.geglu),
            "GATES_LAST": int(self.gates_last),
            "CODES": int(self.codes),
            "CONV": int(self.convolution),
            "UPSAMPLE": int(self.upsample),
            "FLOATS": int(self.floats),
            "BFLOATS": int(self.bfloats),
        }

    def prelude(self) -> str:
        """Returns the source of `multiply`: `d += a b` by an instruction of 64 rows, `bn` columns and 32 terms."""
        return wgmma(self.bn)

    def label(self) -> str:
        """Returns the name of the tile for tables."""
        kind = "geglu" if self.geglu else "upsample" if self.upsample else "conv" if self.convolution else "linear"
        extras = f"-x{self.blocks}" if self.blocks > 1 else ""
        extras += (
            "-gates-last" * self.gates_last
            + "-codes" * self.codes
            + ("-f32" if self.floats else "-bf16" if self.bfloats else "")
            + (f"-split{self.split}" if self.split > 1 else "")
        )
        return f"{kind}-{self.bm}x{self.bn}x{self.bk}{extras}"
