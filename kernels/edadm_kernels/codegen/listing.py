"""Reads the disassembly of a kernel as instructions and loops."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")
MMA = ("IMMA", "IGMMA")
FLOAT_MMA = ("HMMA", "HGMMA")
SPILLS = ("LDL", "STL")
ASYNC_COPIES = ("LDGSTS", "UTMALDG", "UBLKCP")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    Args:
        opcode: The opcode with modifiers, such as `LDG.E.128`.
        target: The index of the instruction that it branches to; `None` for one that does not branch.
    """

    opcode: str
    target: int | None

    @property
    def family(self) -> str:
        """Returns the opcode without modifiers, such as `LDG`."""
        return self.opcode.split(".", 1)[0]


@dataclass(frozen=True)
class Listing:
    """A kernel's instructions in order."""

    instructions: tuple[Instruction, ...]

    def loops(self) -> list[tuple[Instruction, ...]]:
        """Returns the bodies of the loops, each from the target of a backward branch to the branch."""
        return [self.instructions[slice(*span)] for span in self._spans()]

    def _spans(self) -> list[tuple[int, int]]:
        """Returns the indices of the first instruction of each loop and of the one after its last."""
        spans = []
        for index, instruction in enumerate(self.instructions):
            start = instruction.target
            # a branch to itself is the trap after the last instruction
            if start is not None and start < index:
                body = self.instructions[start : index + 1]
                # code that rarely runs is placed after the end of the kernel and jumps back into it: that is no loop
                if not count(body, "EXIT"):
                    spans.append((start, index + 1))
        return spans

    def main_loop(self) -> tuple[Instruction, ...]:
        """Returns the innermost loop with the most matrix instructions; it is empty if no loop has any."""
        spans = [span for span in self._spans() if count(self.instructions[slice(*span)], *MMA)]
        # a loop around the main one has its instructions too, and maybe more, from a first step that was peeled off
        innermost = [
            (start, end)
            for start, end in spans
            if not any(start <= a and b <= end and (a, b) != (start, end) for a, b in spans)
        ]
        bodies = [self.instructions[slice(*span)] for span in innermost]
        most = max((count(body, *MMA) for body in bodies), default=0)
        return min((body for body in bodies if count(body, *MMA) == most), key=len, default=())


def count(instructions: tuple[Instruction, ...], *families: str) -> int:
    """Returns how many of `instructions` belong to one of `families`."""
    return sum(instruction.family in families for instruction in instructions)


def parse(disassembly: str) -> Listing:
    """Returns the listing of what `disassemble` returns for a binary.

    Raises:
        ValueError: The target of a branch is no instruction of the listing.
    """
    parts = [match.groups() for line in disassembly.splitlines() if (match := _INSTRUCTION.match(line))]
    indices = {int(address, 16): index for index, (address, _, _) in enumerate(parts)}
    return Listing(tuple(Instruction(opcode, _target(opcode, operands, indices)) for _, opcode, operands in parts))


def _target(opcode: str, operands: str, indices: Mapping[int, int]) -> int | None:
    """Returns the index of the instruction that a branch leads to; `None` for other instructions."""
    if opcode.split(".", 1)[0] != "BRA":
        return None
    address = _TARGET.search(operands)
    if address is None or int(address.group(1), 16) not in indices:
        raise ValueError(f"the address of an instruction is expected after {opcode}, found {operands!r}")
    return indices[int(address.group(1), 16)]
