"""What the machine code of a kernel shows, as one row of the table."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from edadm_kernels.codegen.compilation import AnyVariant, Binary
from edadm_kernels.codegen.disassembly import count_registers
from edadm_kernels.codegen.listing import ASYNC_COPIES, FLOAT_MMA, MMA, SPILLS, count, parse


@dataclass(frozen=True)
class MachineCode:
    """What the machine code of one variant shows on one architecture.

    Args:
        module: Module of the kernel, such as "gemm".
        name: Name of the variant.
        arch: The architecture, such as 90 for sm_90.
        num_warps: Warps per program.
        num_stages: Number of stages of the pipeline.
        registers: Registers per thread.
        shared_bytes: Bytes of shared memory per program.
        has_dot: Whether the source multiplies matrices.
        tile_rows: Rows of the tile of a matrix product; 0 for other kernels.
        mma: Opcode family of the matrix instructions in the main loop, such as "IGMMA"; empty if there are none.
        loop_mma: Integer matrix instructions in the main loop.
        float_mma: Floating-point matrix instructions in the whole kernel.
        float_warp_groups: Floating-point matrix instructions that a group of four warps issues.
        loop_instructions: Instructions in the main loop.
        loop_prmt: Byte shuffles in the main loop.
        loop_spills: Loads and stores of spilled registers in the main loop.
        loop_copies: Asynchronous copies to shared memory in the main loop, or in the loop of the warp that copies.
        loop_narrow_copies: Asynchronous copies of less than 16 bytes.
        spills: Loads and stores of spilled registers in the whole kernel.
        loads: Loads from global memory in the whole kernel.
        wide_loads: Loads of 16 bytes from global memory.
        sha256: Hash of `Binary.program`, to which line numbers of the source make no difference.
    """

    module: str
    name: str
    arch: int
    num_warps: int
    num_stages: int
    registers: int
    shared_bytes: int
    has_dot: bool
    tile_rows: int
    mma: str
    loop_mma: int
    float_mma: int
    float_warp_groups: int
    loop_instructions: int
    loop_prmt: int
    loop_spills: int
    loop_copies: int
    loop_narrow_copies: int
    spills: int
    loads: int
    wide_loads: int
    sha256: str

    @property
    def instructions_per_mma(self) -> float:
        """Returns the instructions of the main loop per matrix instruction; 0 if there are none."""
        return self.loop_instructions / self.loop_mma if self.loop_mma else 0.0


def describe(module: str, variant: AnyVariant, arch: int, binary: Binary, disassembly: str) -> MachineCode:
    """Returns what the binary of `variant` and its disassembly show."""
    listing = parse(disassembly)
    everything, loop = listing.instructions, listing.main_loop()
    copies = [instruction for instruction in loop if instruction.family in ASYNC_COPIES]
    if not copies:  # a separate warp may copy
        copies = [instruction for instruction in everything if instruction.family == "UTMALDG"]
    return MachineCode(
        module=module,
        name=variant.name,
        arch=arch,
        num_warps=variant.num_warps,
        num_stages=variant.num_stages,
        registers=count_registers(binary.cubin),
        shared_bytes=binary.shared_bytes,
        has_dot=binary.has_dot,
        tile_rows=variant.tile_rows,
        mma=next((instruction.family for instruction in loop if instruction.family in MMA), ""),
        loop_mma=count(loop, *MMA),
        float_mma=count(everything, *FLOAT_MMA),
        float_warp_groups=count(everything, "HGMMA"),
        loop_instructions=len(loop),
        loop_prmt=count(loop, "PRMT"),
        loop_spills=count(loop, *SPILLS),
        loop_copies=len(copies),
        loop_narrow_copies=sum(copy.family == "LDGSTS" and ".128" not in copy.opcode for copy in copies),
        spills=count(everything, *SPILLS),
        loads=count(everything, "LDG"),
        wide_loads=sum(instruction.family == "LDG" and ".128" in instruction.opcode for instruction in everything),
        sha256=hashlib.sha256(binary.program).hexdigest(),
    )
