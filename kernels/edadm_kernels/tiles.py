"""Chooses the tile of a product kernel for a shape, from measured choices and a cost model.

Nothing is timed at run time. Whatever tile is chosen, the integers are the same and so is every rounding after them;
only the time differs. What is known of GPUs is in `tuning`; the tiles that the kernels are compiled with are here, by
their matrix instruction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from edadm_kernels.tuning import FITTED, Costs, Machine, architectures, load

Kind = Literal["linear", "geglu", "conv"]
KINDS: tuple[Kind, ...] = ("linear", "geglu", "conv")
Key = tuple[int, str, int, int, int, bool]
INTERPRETER = 0  # the architecture of tiles for TRITON_INTERPRET=1


@dataclass(frozen=True)
class Tile:
    """Compile-time parameters of a product kernel.

    Args:
        bm: Rows (output pixels) per program.
        bn: Output channels per program.
        bk: Terms of a sum per step of the loop; it divides the channels where it can.
        num_warps: Warps per program.
        num_stages: Depth of the software pipeline.
        column_parts: Number of pieces of the epilogue.
        max_registers: Registers per thread; it is set where the compiler would take more than two programs per
            multiprocessor allow.
        taps_inner: Whether a convolution sums all taps of `bk` channels before the next channels.
        split_k: Number of parts of the sum; a separate program computes each.
        group_m: Number of rows of tiles that are computed one after another, so that they share weights in the L2.
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
        """Returns the bytes of shared memory of the pipeline's buffers."""
        return (self.bm + self.bn) * self.bk * self.num_stages

    def launch_options(self) -> dict[str, Any]:
        """Returns the options of a launch, which are also those of an ahead-of-time compilation."""
        options: dict[str, Any] = {"enable_fp_fusion": False}  # the reference rounds between product and sum
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options


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

_TILES = {"wgmma": (_WGMMA, _WGMMA_W4), "mma": (_MMA, _MMA_W4)}
_INTERPRETER = Machine(multiprocessors=1, macs_per_clock=1024, l2_bytes_per_clock=32, shared_bytes=100_000)

SPLITS = (1, 2, 3, 4, 6, 8)
SPLIT_ROWS = 512  # the largest number of rows of a product whose sums may be split
_OLDEST = 80  # the first compute capability whose tensor cores multiply int8 as the kernels do
_REGISTERS, _MOST_REGISTERS = 65536, 255  # per multiprocessor; per thread


def known_arch(arch: int) -> int:
    """Returns the compute capability whose tuning serves `arch` (such as 90 for 9.0).

    A capability without a file in `tuning` is served by the latest earlier one whose instruction it has: `wgmma` exists
    on 9.0 alone, so later capabilities get the tiles of the synchronous `mma`.

    Raises:
        RuntimeError: The tensor cores are too old.
    """
    if arch == INTERPRETER or arch in architectures():
        return arch
    if arch < _OLDEST:
        raise RuntimeError(
            f"a GPU of compute capability 8.0 or later is expected, found {arch / 10}; use the reference"
        )
    return max(known for known in architectures() if known < arch and load(known).instruction == "mma")


def shipped(arch: int, packed: bool = False) -> list[Tile]:
    """Returns every tile that `choose` may return, without splits, in order of preference among equals.

    Args:
        arch: Compute capability, such as 90; 0 for the interpreter.
        packed: Whether the weights are packed four-bit codes.
    """
    arch = known_arch(arch)
    unpacked, four_bits = (_SMALL, _SMALL_W4) if arch == INTERPRETER else _TILES[load(arch).instruction]
    return list(four_bits if packed else unpacked)


def machine_of(arch: int) -> tuple[Machine, Costs]:
    """Returns the data sheet and the constants of the cost model of a compute capability that `known_arch` returns."""
    if arch == INTERPRETER:
        return _INTERPRETER, load(FITTED).costs
    tuning = load(arch)
    return tuning.machine, tuning.costs


def _measured() -> dict[Key, Tile]:
    """Returns the measured choices of all files in `tuning`."""
    measured: dict[Key, Tile] = {}
    for arch in architectures():
        shapes = {(tile.bm, tile.bn, tile.bk): tile for tile in shipped(arch)}
        for (kind, m, n, k), (bm, bn, bk, split_k) in load(arch).fastest.items():
            measured[arch, kind, m, n, k, False] = replace(shapes[bm, bn, bk], split_k=split_k)
    return measured


MEASURED = _measured()
"""Tiles that come before those of the cost model, by (architecture, kind, M, N, K, packed weights)."""


@lru_cache(maxsize=4096)
def choose(arch: int, kind: Kind, m: int, n: int, k: int, channels: int | None = None, packed: bool = False) -> Tile:
    """Returns the tile for a product of `[m, k]` and `[n, k]`.

    Args:
        arch: Compute capability, such as 90; 0 for the interpreter.
        kind: The kind of kernel.
        m: Rows, or output pixels.
        n: Output channels.
        k: Terms per sum.
        channels: Input channels of a convolution; `None` means k.
        packed: Whether the weights are packed four-bit codes; the tile's `bk` is then `pack.w4_block(channels)`.
    """
    arch = known_arch(arch)
    measured = MEASURED.get((arch, kind, m, n, k, packed))
    if measured is not None:
        return measured
    return min(candidates(arch, kind, m, k, channels, packed), key=lambda tile: cost(arch, kind, tile, m, n, k))


def candidates(arch: int, kind: Kind, m: int, k: int, channels: int | None = None, packed: bool = False) -> list[Tile]:
    """Returns the tiles that suit a shape, each with every split worth considering; arguments as in `choose`."""
    run = channels or k
    tiles = shipped(arch, packed)
    if packed:
        tiles = [tile for tile in tiles if tile.bk == (128 if run % 128 == 0 else 64)]
    else:
        # steps that leave no remainder, or else those that waste the fewest terms
        waste = min(-run % tile.bk for tile in tiles)
        tiles = [tile for tile in tiles if -run % tile.bk == waste]
    splits = SPLITS if m <= SPLIT_ROWS and kind != "geglu" else (1,)
    return [replace(tile, split_k=s) for tile in tiles for s in splits if s == 1 or s * 4 * tile.bk <= k]


def cost(arch: int, kind: Kind, tile: Tile, m: int, n: int, k: int) -> float:
    """Estimates the clocks of a product: whole rounds of programs, each bound by its MMA, its loads, or latency.

    Args:
        arch: A compute capability that `known_arch` returns.
        kind: The kind of kernel.
        tile: The tile, with its split.
        m: Rows, or output pixels.
        n: Output channels.
        k: Terms per sum.
    """
    machine, costs = machine_of(arch)
    programs = -(-m // tile.bm) * -(-n // tile.bn) * tile.split_k
    steps = -(-k // (tile.bk * tile.split_k))
    compute = tile.bm * tile.bn * tile.bk / machine.macs_per_clock
    loads = (tile.bm + tile.bn) * tile.bk / machine.l2_bytes_per_clock
    registers = 32 * tile.num_warps * (tile.max_registers or _MOST_REGISTERS)
    resident = max(1, min(machine.shared_bytes // tile.shared_bytes, _REGISTERS // registers))
    together = min(resident, -(-programs // machine.multiprocessors))
    # programs that share a multiprocessor hide each other's latency
    step = max(compute * together, loads * together, compute + costs.step_clocks)
    epilogue = costs.element_clocks * tile.bm * tile.bn * (costs.geglu_factor if kind == "geglu" else 1.0)
    clocks = -(-programs // (machine.multiprocessors * together)) * (steps * step + costs.program_clocks + epilogue)
    if tile.split_k > 1:  # the second kernel reads the parts
        clocks += 4 * m * n * (tile.split_k + 1) / (machine.multiprocessors * machine.l2_bytes_per_clock)
    return clocks
