"""The rules that the machine code of every kernel must follow."""

from __future__ import annotations

from edadm_kernels.codegen.machine_code import MachineCode
from edadm_kernels.launching import PROGRAM_SHARED_BYTES

WGMMA_ROWS = 64  # rows of the smallest tile for Hopper's warp-group matrix instruction


def violations(code: MachineCode) -> list[str]:
    """Returns the reasons to reject a kernel, each one clause; the list is empty for sound code."""
    reasons = []
    if code.shared_bytes > (most := PROGRAM_SHARED_BYTES[code.arch]):
        reasons.append(f"{code.shared_bytes} bytes of shared memory where a program has {most}")
    if code.float_mma or (code.loop_mma and not code.has_dot):
        return reasons + _attention_violations(code)
    return reasons + (_product_violations(code) if code.has_dot else _stream_violations(code))


def _attention_violations(code: MachineCode) -> list[str]:
    """Checks attention: nothing is spilled, and in CUDA C++ its products are warp-group instructions."""
    reasons = [f"{code.spills} LDL/STL (spilled registers)"] if code.spills else []
    if code.loop_mma and code.mma != "IGMMA":
        reasons.append(f"{code.mma} where attention of integers should give IGMMA")
    if code.module == "hopper" and code.float_warp_groups < code.float_mma:
        reasons.append(f"{code.float_mma - code.float_warp_groups} matrix instructions that are not HGMMA")
    return reasons


def _product_violations(code: MachineCode) -> list[str]:
    """Checks a matrix product: a pipelined main loop with integer tensor cores, without spills and byte shuffles."""
    if not code.loop_mma:
        return ["no loop has an integer matrix instruction"]
    reasons = []
    if code.arch == 90 and code.tile_rows >= WGMMA_ROWS and code.mma != "IGMMA":
        reasons.append(f"{code.mma} where a tile of {code.tile_rows} rows should give IGMMA")
    if code.loop_spills:
        reasons.append(f"{code.loop_spills} LDL/STL (spilled registers) in the main loop")
    if code.loop_prmt:
        reasons.append(f"{code.loop_prmt} PRMT (byte shuffles) in the main loop")
    if code.num_stages > 1 and not code.loop_copies:
        reasons.append(f"no asynchronous copy in the main loop of a pipeline of {code.num_stages} stages")
    if code.loop_narrow_copies:
        reasons.append(f"{code.loop_narrow_copies} of {code.loop_copies} copies of the main loop under 16 bytes")
    return reasons


def _stream_violations(code: MachineCode) -> list[str]:
    """Checks a kernel bound by memory: it has 16-byte loads and no spills."""
    reasons = []
    if code.spills:
        reasons.append(f"{code.spills} LDL/STL (spilled registers)")
    if not code.wide_loads:
        reasons.append(f"none of {code.loads} loads is 16 bytes wide")
    return reasons
