"""Measures cases in separate processes: several are compiled at once, and while one is timed the others are stopped."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COMPILED = "compiled"
"""The line that a process prints when it can be timed. It then waits for a line of input, and prints its result."""
TIMING_SECONDS = 60.0
"""The time limit of a case once it is compiled."""


@dataclass
class Running:
    """A process that measures one case, with all processes that it starts.

    Args:
        case: The case.
        process: The process, whose output is not buffered.
        errors: The file of its errors.
        deadline: The time at which it must be compiled.
    """

    case: str
    process: subprocess.Popen[bytes]
    errors: Any
    deadline: float
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def start(cls, case: str, command: list[str], seconds: float) -> Running:
        """Starts the process of a case, which is the last argument of its command."""
        errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # it is read when the process has ended
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [*command, case], bufsize=0, stdin=pipe, stdout=pipe, stderr=errors, start_new_session=True
        )
        return cls(case, process, errors, time.monotonic() + seconds)

    def line(self, seconds: float) -> str | None:
        """Returns the next line that the process prints, empty if it has ended; `None` if there is none in time."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], max(0.0, seconds))[0]:
            return None
        return self.process.stdout.readline().decode()

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the process and those that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def result(self, running: list[Running]) -> str:
        """Returns the line of JSON of a compiled case with its name; the others are stopped while it is timed."""
        assert self.process.stdin is not None
        others = [other for other in running if other is not self]
        for other in others:
            other.send(signal.SIGSTOP)
        self.process.stdin.write(b"\n")
        last = time.monotonic() + TIMING_SECONDS
        line = self.line(TIMING_SECONDS)
        while line and not line.startswith("{"):
            line = self.line(last - time.monotonic())
        for other in others:
            other.send(signal.SIGCONT)
        if not line:
            return self.failure(ended=line is not None)
        self.end()
        return json.dumps({"case": self.case, **json.loads(line)})

    def failure(self, ended: bool) -> str:
        """Ends the process and returns a line with the reason why there is no result."""
        row: dict[str, Any] = {"case": self.case, "stopped": f"after {time.monotonic() - self.started:.0f} s"}
        if ended:
            self.process.wait()
            self.errors.seek(0)
            row = {"case": self.case, "error": self.errors.read()[-1500:]}
        self.end()
        return json.dumps(row)

    def end(self) -> None:
        """Ends the process and those that it has started."""
        self.send(signal.SIGKILL)
        self.process.wait()
        self.errors.close()


def add_line(line: str, path: Path | None) -> None:
    """Prints a line and appends it to a file, if there is one."""
    print(line, flush=True)
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def unfinished(cases: list[str], path: Path | None, settings: dict[str, Any]) -> list[str]:
    """Returns the cases without a result in a file of lines.

    Args:
        cases: The cases.
        path: The file; it may be missing.
        settings: What a line must say for its case to be finished: settings that change the result.
    """
    if path is None or not path.exists():
        return cases
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    reasons = {"error", "stopped", "skipped"}
    done = {
        row.get("case")
        for row in rows
        if not reasons & row.keys() and all(row.get(name) == value for name, value in settings.items())
    }
    return [case for case in cases if case not in done]


def measure(
    cases: list[str], command: list[str], at_once: int, cap: float, seconds: float, sign: Path | None = None
) -> Iterator[str]:
    """Yields a line of JSON per case; no process is left over when the iteration ends, however it ends.

    Args:
        cases: The cases.
        command: The command that measures the case that is appended to it.
        at_once: Number of cases that are compiled at the same time.
        cap: The time limit of compiling one case, in seconds.
        seconds: The time limit of all cases.
        sign: A file; compiled cases wait until it exists. Without one they are timed at once.
    """
    last = time.monotonic() + seconds
    running: list[Running] = []
    compiled: list[Running] = []
    waiting = list(cases)
    try:
        while waiting or running:
            while waiting and len(running) < at_once and time.monotonic() < last:
                running.append(Running.start(waiting.pop(0), command, cap))
            if not running:
                yield json.dumps({"case": waiting.pop(0), "skipped": "no time left"})
                continue
            may_time = sign is None or sign.exists()
            for case in list(running):
                if case not in compiled:
                    line = case.line(0.2)
                    if line and line.strip() != COMPILED:  # something that a library prints
                        continue
                    if line is None and time.monotonic() < min(case.deadline, last):
                        continue
                    if not line:
                        running.remove(case)
                        yield case.failure(ended=line is not None)
                        continue
                    compiled.append(case)
                if may_time or time.monotonic() > last:
                    result = case.result(running) if may_time else case.failure(ended=False)
                    running.remove(case)
                    yield result
            if not may_time:
                time.sleep(0.2)
    finally:  # the processes have a session of their own, so that an interrupt does not reach them
        for case in running:
            case.end()
