"""Which tile of a product kernel runs for which shape: tables and a small cost model, no measuring at run time.

Whatever tile is chosen, the integers are the same and so is every rounding after them; only the time differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from edadm_kernels.measured import FASTEST

Kind = Literal["linear", "geglu", "conv"]
KINDS: tuple[Kind, ...] = ("linear", "geglu", "conv")
Key = tuple[int, str, int, int, int, bool]
INTERPRETER = 0  # the architecture of tiles for TRITON_INTERPRET=1


@dataclass(frozen=True)
class Tile:
    """Compile-time parameters of a product kernel.

    Args:
        bm: Rows (output pixels) a program.
        bn: Output channels a program.
        bk: Products a step of the loop; divides the channels where it can.
        num_warps: Warps a program.
        num_stages: Depth of the software pipeline.
        column_parts: Pieces of the epilogue.
        max_registers: Registers a thread, where the compiler would take more than two programs a multiprocessor allow.
        taps_inner: Convolutions: all taps of `bk` channels before the next channels.
        split_k: Parts of the sum, each a program of its own.
        group_m: Tile rows walked together.
    """

    bm: int
    bn: int
    bk: int
    num_warps: int
    num_stages: int
    column_parts: int = 1
    max_registers: int | None = None
    taps_inner: bool = True
    split_k: int = 1
    group_m: int = 8

    @property
    def shared_bytes(self) -> int:
        """Shared memory of the pipeline's buffers."""
        return (self.bm + self.bn) * self.bk * self.num_stages

    def launch_options(self) -> dict[str, Any]:
        """Options of a launch, which are also those of an ahead-of-time compilation."""
        options: dict[str, Any] = {"enable_fp_fusion": False}  # the reference rounds between product and sum
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options


@dataclass(frozen=True)
class Machine:
    """What the cost model knows of an architecture."""

    multiprocessors: int
    macs_per_clock: int  # int8, one multiprocessor
    l2_bytes_per_clock: int  # one multiprocessor's share
    shared_bytes: int  # one multiprocessor
    tiles: tuple[Tile, ...]
    w4_tiles: tuple[Tile, ...]


_WGMMA = tuple(
    tile
    for bk, deeper in ((128, 0), (64, 1))
    for tile in (
        Tile(128, 256, bk, num_warps=8, num_stages=3 + deeper, column_parts=4),
        Tile(256, 128, bk, num_warps=8, num_stages=3 + deeper, column_parts=4),
        Tile(128, 128, bk, num_warps=8, num_stages=3 + deeper, column_parts=4, max_registers=128),
        Tile(256, 64, bk, num_warps=8, num_stages=3 + deeper, column_parts=2, max_registers=128),
        Tile(128, 64, bk, num_warps=4, num_stages=3 + deeper, column_parts=2, max_registers=168),
        Tile(64, 128, bk, num_warps=4, num_stages=3 + deeper, column_parts=2, max_registers=168),
        Tile(64, 64, bk, num_warps=4, num_stages=4 + deeper, max_registers=128),
    )
)
_WGMMA_W4 = tuple(
    tile
    for bk in (128, 64)
    for tile in (
        Tile(128, 128, bk, num_warps=8, num_stages=3, column_parts=4),
        Tile(64, 64, bk, num_warps=4, num_stages=4),
    )
)
_MMA = (
    Tile(128, 128, 64, num_warps=8, num_stages=3, column_parts=2),
    Tile(128, 64, 64, num_warps=4, num_stages=3, column_parts=2),
    Tile(64, 64, 64, num_warps=4, num_stages=4),
)
_MMA_W4 = tuple(
    tile
    for bk in (128, 64)
    for tile in (
        Tile(128, 128, bk, num_warps=8, num_stages=3, column_parts=2),
        Tile(64, 64, bk, num_warps=4, num_stages=3),
    )
)
_SMALL = (Tile(32, 32, 64, num_warps=4, num_stages=1),)
_SMALL_W4 = (*_SMALL, Tile(32, 32, 128, num_warps=4, num_stages=1))

MACHINES: Mapping[int, Machine] = {
    INTERPRETER: Machine(1, 1024, 32, 100_000, _SMALL, _SMALL_W4),
    80: Machine(108, 2048, 40, 164_000, _MMA, _MMA_W4),
    86: Machine(82, 1024, 24, 100_000, _MMA, _MMA_W4),
    89: Machine(128, 1024, 24, 100_000, _MMA, _MMA_W4),
    90: Machine(132, 4096, 70, 227_000, _WGMMA, _WGMMA_W4),
}

SPLITS = (1, 2, 3, 4, 6, 8)
SPLIT_ROWS = 512  # products of at most so many rows may be split
# Fitted to 679 timings on an H200, where the choice costs 0.6% over the best tile of each shape.
_PROGRAM_CLOCKS = 2570  # filling the pipeline
_ELEMENT_CLOCKS = 0.27  # the epilogue of one element of the output
_GEGLU = 1.27  # how much longer a gated epilogue takes
_STEP_CLOCKS = 520  # latency of one step's MMA, which is waited for
_REGISTERS, _MOST_REGISTERS = 65536, 255  # of a multiprocessor; of a thread


def known_arch(arch: int) -> int:
    """The table that serves compute capability `arch` (as 90 for 9.0).

    Raises:
        RuntimeError: The tensor cores are too old.
    """
    if arch in MACHINES:
        return arch
    if arch < 80:
        raise RuntimeError(
            f"a GPU of compute capability 8.0 or newer is expected, found {arch / 10}; use the reference"
        )
    # wgmma is an instruction of 9.0 alone: newer ones take the tiles of the synchronous MMA
    return 80 if arch < 86 else 86 if arch < 89 else 89


def shipped(arch: int, kind: Kind, packed: bool = False) -> list[Tile]:
    """Every tile that `choose` may return but for its split, in order of preference among equals."""
    del kind  # one list serves all; a measurement may part them
    machine = MACHINES[known_arch(arch)]
    return list(machine.w4_tiles if packed else machine.tiles)


def _measured() -> dict[Key, Tile]:
    """The tiles of `measured.FASTEST`."""
    found: dict[Key, Tile] = {}
    for arch, fastest in FASTEST.items():
        shapes = {(tile.bm, tile.bn, tile.bk): tile for tile in MACHINES[arch].tiles}
        for (kind, m, n, k), (bm, bn, bk, split_k) in fastest.items():
            found[arch, kind, m, n, k, False] = replace(shapes[bm, bn, bk], split_k=split_k)
    return found


MEASURED = _measured()
"""Tiles that come before the cost model's, by (architecture, kind, M, N, K, packed weights)."""


@lru_cache(maxsize=4096)
def choose(arch: int, kind: Kind, m: int, n: int, k: int, channels: int | None = None, packed: bool = False) -> Tile:
    """The tile of a product of `[m, k]` with `[n, k]`.

    Args:
        arch: Compute capability, such as 90; 0 for the interpreter.
        kind: Which kernel.
        m: Rows, or output pixels.
        n: Output channels.
        k: Products a sum has.
        channels: Input channels of a convolution; None: k.
        packed: Four-bit weights; the tile's `bk` is then `pack.w4_block(channels)`.
    """
    arch = known_arch(arch)
    measured = MEASURED.get((arch, kind, m, n, k, packed))
    if measured is not None:
        return measured
    return min(
        candidates(arch, kind, m, k, channels, packed), key=lambda tile: _cost(MACHINES[arch], kind, tile, m, n, k)
    )


def candidates(arch: int, kind: Kind, m: int, k: int, channels: int | None = None, packed: bool = False) -> list[Tile]:
    """The tiles that suit a shape, each with every split worth considering; arguments as in `choose`."""
    run = channels or k
    tiles = shipped(arch, kind, packed)
    if packed:
        tiles = [tile for tile in tiles if tile.bk == (128 if run % 128 == 0 else 64)]
    else:
        # steps that leave no tail, or else those that waste the least
        waste = min(-run % tile.bk for tile in tiles)
        tiles = [tile for tile in tiles if -run % tile.bk == waste]
    splits = SPLITS if m <= SPLIT_ROWS and kind != "geglu" else (1,)
    return [replace(tile, split_k=s) for tile in tiles for s in splits if s == 1 or s * 4 * tile.bk <= k]


def _cost(machine: Machine, kind: Kind, tile: Tile, m: int, n: int, k: int) -> float:
    """Clocks that a product takes, roughly: whole rounds of programs, each bound by its MMA, its loads, or latency."""
    programs = -(-m // tile.bm) * -(-n // tile.bn) * tile.split_k
    steps = -(-k // (tile.bk * tile.split_k))
    compute = tile.bm * tile.bn * tile.bk / machine.macs_per_clock
    loads = (tile.bm + tile.bn) * tile.bk / machine.l2_bytes_per_clock
    registers = 32 * tile.num_warps * (tile.max_registers or _MOST_REGISTERS)
    resident = max(1, min(machine.shared_bytes // tile.shared_bytes, _REGISTERS // registers))
    together = min(resident, -(-programs // machine.multiprocessors))
    # programs that share a multiprocessor hide each other's latency
    step = max(compute * together, loads * together, compute + _STEP_CLOCKS)
    epilogue = _ELEMENT_CLOCKS * tile.bm * tile.bn * (_GEGLU if kind == "geglu" else 1.0)
    clocks = -(-programs // (machine.multiprocessors * together)) * (steps * step + _PROGRAM_CLOCKS + epilogue)
    if tile.split_k > 1:  # the second kernel reads the parts
        clocks += 4 * m * n * (tile.split_k + 1) / (machine.multiprocessors * machine.l2_bytes_per_clock)
    return clocks
