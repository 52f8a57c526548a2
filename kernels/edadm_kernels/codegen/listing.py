"""A kernel's disassembly as instructions and loops."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LABEL = re.compile(r"^\s*(\.L_\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
MMA = ("IMMA", "IGMMA")
FLOAT_MMA = ("HMMA", "HGMMA")
SPILLS = ("LDL", "STL")
ASYNC_COPIES = ("LDGSTS", "UTMALDG", "UBLKCP")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: its opcode with modifiers, such as `LDG.E.128`, and the label it branches to."""

    opcode: str
    target: str | None

    @property
    def family(self) -> str:
        """The opcode without modifiers, such as `LDG`."""
        return self.opcode.split(".", 1)[0]


@dataclass(frozen=True)
class Listing:
    """A kernel's instructions in order, and the index at which each label stands."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    def loops(self) -> list[tuple[Instruction, ...]]:
        """Bodies of the loops, each from the target of a backward branch to the branch."""
        bodies = []
        for index, instruction in enumerate(self.instructions):
            start = self.labels.get(instruction.target or "")
            # a branch to itself is the trap behind the last instruction
            if instruction.family == "BRA" and start is not None and start < index:
                body = self.instructions[start : index + 1]
                # code that is seldom run stands behind the end of the kernel and jumps back into it: no loop
                if not count(body, "EXIT"):
                    bodies.append(body)
        return bodies

    def main_loop(self) -> tuple[Instruction, ...]:
        """The innermost loop with the most matrix instructions; empty where no loop has any."""
        bodies = [body for body in self.loops() if count(body, *MMA)]
        most = max((count(body, *MMA) for body in bodies), default=0)
        # a loop around the main one repeats its instructions: of equal counts the shortest is the innermost
        candidates = [body for body in bodies if count(body, *MMA) == most]
        return min(candidates, key=len, default=())


def count(instructions: tuple[Instruction, ...], *families: str) -> int:
    """How many of `instructions` belong to one of `families`."""
    return sum(instruction.family in families for instruction in instructions)


def parse(disassembly: str) -> Listing:
    """A listing of what `nvdisasm -c` prints for a binary with one kernel."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in disassembly.splitlines():
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            target = _TARGET.search(found.group(2))
            instructions.append(Instruction(found.group(1), target.group(1) if target else None))
    return Listing(tuple(instructions), labels)
