"""Which part of a product a program computes: its tile, and its steps of the sum."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(pid, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP_M: tl.constexpr):
    """Returns row and column of tile `pid`.

    The order goes through `GROUP_M` rows of tiles at a time, so that neighbours share operands in the L2.
    """
    num_m = tl.cdiv(M, BM)
    num_n = tl.cdiv(N, BN)
    width = GROUP_M * num_n
    group = pid // width
    first = group * GROUP_M
    size = tl.minimum(num_m - first, GROUP_M)
    return first + (pid % width) % size, (pid % width) // size


@triton.jit
def steps_of_part(steps):
    """Returns the first step of the part of the sum that this program computes, and the step after its last.

    A step is one iteration of the loop of a product. `program_id(1)` is the index of the part; there is one part unless
    the sum is split.
    """
    per_part = tl.cdiv(steps, tl.num_programs(1))
    first = tl.program_id(1) * per_part
    return first, tl.minimum(first + per_part, steps)
