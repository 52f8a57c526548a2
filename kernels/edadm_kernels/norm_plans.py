"""Chooses the block sizes of the normalization kernels from the shape of one sample."""

from __future__ import annotations

from dataclasses import dataclass

CHUNKS = 64  # the largest number of partial statistics per group
CHUNK_ROWS, CHUNK_CHANNELS = 64, 64
FUSED_ELEMENTS = 16384  # in a block that one program holds in registers: 32 per thread of 16 warps
VECTOR = 8  # channels in 16 bytes of float16


def next_power_of_two(value: int) -> int:
    """Returns the smallest power of two that is at least `value`."""
    return 1 << (value - 1).bit_length()


@dataclass(frozen=True)
class GroupPlan:
    """How the `[rows, channels]` of one sample are divided into blocks for GroupNorm.

    Args:
        rows: H * W.
        group_channels: Channels per group.
        groups_per_block: Number of whole groups in a block of the kernels that merge statistics.
        group_blocks: Number of blocks that cover all groups.
        fused: Whether one kernel computes everything, because the rows of a block fit into registers.
        rows_per_chunk: Rows whose statistics one program computes.
        num_chunks: Number of programs along the rows.
        num_warps: Warps per program of the kernels that are not fused.
    """

    rows: int
    group_channels: int
    groups_per_block: int
    group_blocks: int
    fused: bool
    rows_per_chunk: int
    num_chunks: int
    num_warps: int = 4

    @property
    def block_channels(self) -> int:
        """Returns the columns of a block of whole groups, a power of two."""
        return next_power_of_two(self.groups_per_block * self.group_channels)

    @property
    def fused_warps(self) -> int:
        """Returns the warps of the single kernel: about 32 elements per thread."""
        return min(16, max(1, next_power_of_two(self.rows) * self.block_channels // 1024))

    def fused_constexprs(self) -> dict[str, int]:
        """Returns the compile-time arguments of `group_fused`."""
        return {"BLOCK_ROWS": next_power_of_two(self.rows), **self._groups()}

    def block_constexprs(self) -> dict[str, int]:
        """Returns the compile-time arguments of `group_partials` and of `group_apply`."""
        return {"BLOCK_ROWS": CHUNK_ROWS, "BLOCK_CHANNELS": CHUNK_CHANNELS}

    def statistics_constexprs(self) -> dict[str, int]:
        """Returns the compile-time arguments of `group_statistics`."""
        return {"CHUNKS": CHUNKS, **self._groups()}

    def _groups(self) -> dict[str, int]:
        return {
            "GROUP_CHANNELS": self.group_channels,
            "GROUPS": self.groups_per_block,
            "BLOCK_GROUPS": next_power_of_two(self.groups_per_block),
            "BLOCK_CHANNELS": self.block_channels,
        }


def group_plan(rows: int, channels: int, num_groups: int) -> GroupPlan:
    """Returns the blocks for `[rows, channels]`; they do not depend on the batch, nor do the codes of a sample."""
    group_channels = channels // num_groups
    groups = _aligned_groups(num_groups, group_channels)
    fused = next_power_of_two(rows) * next_power_of_two(groups * group_channels) <= FUSED_ELEMENTS
    chunk = CHUNK_ROWS * -(-rows // (CHUNK_ROWS * CHUNKS))
    return GroupPlan(
        rows=rows,
        group_channels=group_channels,
        groups_per_block=groups,
        group_blocks=-(-num_groups // groups),
        fused=fused,
        rows_per_chunk=chunk,
        num_chunks=-(-rows // chunk),
    )


def _aligned_groups(num_groups: int, group_channels: int) -> int:
    """Returns the fewest groups per block whose rows are whole 16-byte vectors; 1 if there is no such number."""
    candidates = (g for g in range(1, num_groups + 1) if g * group_channels % VECTOR == 0)
    return next(candidates, 1)


@dataclass(frozen=True)
class LayerPlan:
    """How rows are divided for LayerNorm: into two powers of two, so that 5 * 2^k columns leave no thread idle.

    Args:
        channels: Columns of a row.
        head: Columns of the first piece.
        tail: Columns of the second piece; 0 if there is none.
        block_rows: Rows per program.
        num_warps: Warps per program.
    """

    channels: int
    head: int
    tail: int
    block_rows: int
    num_warps: int = 4

    def constexprs(self) -> dict[str, int]:
        """Returns the compile-time arguments of `layer_rows`."""
        return {"HEAD": self.head, "TAIL": self.tail, "BLOCK_ROWS": self.block_rows}


_HOPPER_ROWS = {320: 4, 1152: 1, 1280: 1, 1536: 1}
"""Channels -> rows of a program of one warp, where that was measured to be faster on compute capability 9.0."""


def layer_plan(channels: int, arch: int = 0) -> LayerPlan:
    """Returns the pieces for rows of `channels` elements: about 20 elements per thread, or what was measured.

    Args:
        channels: Columns of a row.
        arch: Compute capability, such as 90.
    """
    head = 1 << (channels.bit_length() - 1)
    tail = next_power_of_two(channels - head) if channels > head else 0
    if arch == 90 and channels in _HOPPER_ROWS:
        return LayerPlan(channels, head, tail, _HOPPER_ROWS[channels], num_warps=1)
    return LayerPlan(channels, head, tail, block_rows=max(1, min(16, 2048 // head)))
