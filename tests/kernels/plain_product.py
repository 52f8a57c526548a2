"""An int8 matrix product in few words, compiled for sm_80: prints what the gate says of its two forms, as JSON.

This is a script, because the tests of this folder run where Triton interprets.
"""

from __future__ import annotations

import json

import triton
import triton.language as tl

from edadm_kernels.codegen import compile_variant, describe, disassemble, violations
from edadm_kernels.variants import aligned


@triton.jit
def plain_product(
    x, weight, out, K, N, ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """`out = x @ weight.T`; a tile of weights is read as [BN, BK] and transposed (`ROWS`), or as [BK, BN]."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    step = tl.arange(0, BK)
    x_at = x + rows[:, None] * K + step[None, :]
    across = columns[:, None] * K + step[None, :] if ROWS else columns[None, :] * K + step[:, None]
    weight_at = weight + across
    total = tl.zeros([BM, BN], dtype=tl.int32)
    for _ in range(0, K, BK):
        tile = tl.load(weight_at)
        total = tl.dot(tl.load(x_at), tile.T if ROWS else tile, total, out_dtype=tl.int32)
        x_at += BK
        weight_at += BK
    tl.store(out + rows[:, None] * N + columns[None, :], total)


def judge(arch: int, rows: bool) -> list[str]:
    """What the gate holds against a tile of 128x128x128 in 4 warps."""
    types = {"x": "*i8", "weight": "*i8", "out": "*i32", "K": "i32", "N": "i32"}
    blocks = {"ROWS": rows, "BM": 128, "BN": 128, "BK": 128}
    variant = aligned(arch, "plain", plain_product, types, blocks, num_warps=4, num_stages=3)
    binary = compile_variant(variant, arch)
    return violations(describe("plain", variant, arch, binary, *disassemble([binary.cubin], arch)))


if __name__ == "__main__":
    print(json.dumps({"triton": triton.__version__, "rows": judge(80, True), "columns": judge(80, False)}))
