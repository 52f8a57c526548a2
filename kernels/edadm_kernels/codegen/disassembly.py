"""Disassembles binaries, many at a time: most of the time of nvdisasm for one kernel is its start."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import triton

_INSTRUCTION_BYTES = 16  # on every architecture since 7.0
_ADDRESS = re.compile(r"^\s*/\*([0-9a-f]+)\*/")
_REGISTERS = re.compile(r"REG:(\d+)")
_SECTION_TABLE, _SECTION_COUNTS = 0x28, 0x3A  # offsets in the header of a 64-bit ELF file
_SECTION = struct.Struct("<I4x8x8xQQ24x")  # name, offset, size of a section


def disassemble(cubins: Sequence[bytes], arch: int) -> list[str]:
    """Returns what nvdisasm prints for the code of each binary, all of them in one call.

    Addresses, including those of branches, count from the first instruction of the first binary.

    Args:
        cubins: The binaries.
        arch: The architecture of all binaries, such as 90.

    Raises:
        RuntimeError: A binary has no kernel, or another number of instructions was printed than it has.
    """
    codes = [machine_code(cubin) for cubin in cubins]
    name = f"SM{arch}a" if arch >= 90 else f"SM{arch}"
    # -b: instructions without a file around them; -ndf: without the analysis of the data flow, which is not needed
    printed = _run(triton.knobs.nvidia.nvdisasm.path, "-ndf", "-b", name, data=b"".join(codes))
    lines = [line for line in printed.splitlines() if _ADDRESS.match(line)]
    counts = [len(code) // _INSTRUCTION_BYTES for code in codes]
    if len(lines) != sum(counts):
        raise RuntimeError(f"{sum(counts)} instructions are expected from nvdisasm, found {len(lines)}")
    ends = [sum(counts[: number + 1]) for number in range(len(counts))]
    return ["\n".join(lines[end - count : end]) + "\n" for end, count in zip(ends, counts, strict=True)]


def count_registers(cubin: bytes) -> int:
    """Returns the registers per thread of a binary's kernel, or of the kernel that has the most.

    Raises:
        RuntimeError: cuobjdump does not print the number.
    """
    printed = _run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", data=cubin)
    numbers = _REGISTERS.findall(printed)
    if not numbers:
        raise RuntimeError(f"the registers of a kernel are expected from cuobjdump, found {printed!r}")
    return max(map(int, numbers))


def machine_code(cubin: bytes) -> bytes:
    """Returns the instructions of a binary, without the ELF file around them.

    Raises:
        RuntimeError: The binary has no kernel.
    """
    (table,) = struct.unpack_from("<Q", cubin, _SECTION_TABLE)
    size, count, names = struct.unpack_from("<HHH", cubin, _SECTION_COUNTS)
    sections = [_SECTION.unpack_from(cubin, table + number * size) for number in range(count)]
    strings = sections[names][1]
    code = b"".join(
        cubin[offset : offset + length]
        for name, offset, length in sections
        if cubin.startswith(b".text.", strings + name)
    )
    if not code:
        raise RuntimeError(f"a kernel is expected in a binary of {len(cubin)} bytes, found none")
    return code


def _run(tool: str, *options: str, data: bytes) -> str:
    """Returns what a tool prints about a file with this content."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.cubin"
        path.write_bytes(data)
        return subprocess.run([tool, *options, str(path)], check=True, capture_output=True, text=True).stdout
