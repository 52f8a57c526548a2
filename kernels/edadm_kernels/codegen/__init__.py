"""Compiles every kernel for real architectures on a machine without a GPU and checks the machine code.

    python -m edadm_kernels.codegen --arch 90

Triton compiles without a driver and includes the assembler and the disassembler. The disassembly of a kernel shows what
will run: whether the integer tensor cores are used, whether the main loop spills registers or shuffles bytes, whether
it is pipelined, and whether loads are 16 bytes wide.
"""

from edadm_kernels.codegen.comparison import changes, read_report
from edadm_kernels.codegen.compilation import ARCHITECTURES, MODULES, compile_variant, list_variants
from edadm_kernels.codegen.disassembly import disassemble
from edadm_kernels.codegen.gate import violations
from edadm_kernels.codegen.listing import Listing, parse
from edadm_kernels.codegen.machine_code import MachineCode, describe
from edadm_kernels.codegen.survey import batch, list_jobs, survey

__all__ = [
    "ARCHITECTURES",
    "MODULES",
    "Listing",
    "MachineCode",
    "batch",
    "changes",
    "compile_variant",
    "describe",
    "disassemble",
    "list_jobs",
    "list_variants",
    "parse",
    "read_report",
    "survey",
    "violations",
]
