"""The reporter: bars only on a terminal, warnings always, nested tasks in one display."""

from __future__ import annotations

import os
import platform
import pty
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from edadm_cli.cli import console
from edadm_cli.cli.console import ConsoleReporter, can_redraw
from edadm_cli.cli.process_setup import keep_freed_memory
from edadm_cli.progress import Reporter, SilentReporter, long_step

QUICK = {"_LINE_SECONDS": 0.02, "_TICK_SECONDS": 0.001}
SCRIPT = """
from edadm_cli.cli.console import ConsoleReporter
import sys
reporter = ConsoleReporter(bars=sys.stderr.isatty(), verbose=False)
with reporter.task("units [bold]", 3) as unit:
    for _ in range(3):
        with reporter.task("iterations", 2) as iteration:
            iteration(2)
        reporter.warn("take [care]")
        unit(1)
with reporter.task("again", 1) as unit:
    unit(1)
"""


def test_both_reporters_fit_the_protocol() -> None:
    reporters: list[Reporter] = [ConsoleReporter(bars=False, verbose=False), SilentReporter()]
    for reporter in reporters:
        with reporter.task("work", 2) as advance:
            advance(2)
        reporter.note("detail")
        reporter.warn("careful")
        assert reporter.warnings == ["careful"]


def test_without_a_terminal_there_are_warnings_and_no_bars() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr == "warning: take [care]\n" * 3


def test_in_a_log_progress_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 10.0, 31.0, 40.0, 62.0])
    monkeypatch.setattr("edadm_cli.cli.console.time", SimpleNamespace(monotonic=lambda: next(clock)))
    reporter = ConsoleReporter(bars=False, verbose=False, lines=True)
    with reporter.task("units", 9) as advance:
        for _ in range(4):
            advance(2)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["units: 4 of 9 done, 31 s after the start", "units: 8 of 9 done, 62 s after the start"]


def test_a_log_shows_that_a_step_without_progress_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in QUICK.items():
        monkeypatch.setattr(console, name, value)
    written: list[str] = []

    def wait_for(text: str) -> None:
        deadline = time.monotonic() + 20
        while not any(line.startswith(text) for line in written):
            assert time.monotonic() < deadline, f"there is no line '{text}' in {written}"
            time.sleep(0.005)
            written.extend(capsys.readouterr().err.splitlines())

    reporter = ConsoleReporter(bars=False, verbose=False, lines=True)
    with reporter.alive("edadm bench"):
        wait_for("edadm bench is still working, 0 s after the start")
        with long_step(lambda: "downloading owner/name"):
            wait_for("downloading owner/name, 0 s")
        with reporter.task("units", 9) as advance:
            advance(4)
            wait_for("units: 4 of 9 done, 0 s")
        written.clear()
        wait_for("edadm bench is still working")
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().err == "", "nothing is written after the end"


@pytest.mark.parametrize("options", [{"silent": True, "lines": True}, {"lines": False}])
def test_a_quiet_command_and_a_further_process_show_no_sign_of_life(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: dict[str, bool]
) -> None:
    for name, value in QUICK.items():
        monkeypatch.setattr(console, name, value)
    with ConsoleReporter(bars=False, verbose=False, **options).alive("edadm bench"):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("is_terminal", "kind", "redraws"),
    [(True, "xterm", True), (True, "dumb", False), (True, "", True), (False, "xterm", False)],
)
def test_a_terminal_that_cannot_redraw_gets_lines(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool, kind: str, redraws: bool
) -> None:
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: is_terminal))
    monkeypatch.setenv("TERM", kind)
    assert can_redraw() is redraws


WARNING = "import warnings; warnings.warn('of a library')"
STARTING = f"""
import subprocess, sys
from edadm_cli.cli.process_setup import silence_libraries
silence_libraries(verbose=len(sys.argv) > 1)
{WARNING}
subprocess.run([sys.executable, "-c", {WARNING!r}], check=True)
"""


@pytest.mark.parametrize(("arguments", "count"), [([], 0), (["--verbose"], 2)])
def test_warnings_of_libraries_are_for_the_verbose_in_processes_that_are_begun_too(
    arguments: list[str], count: int
) -> None:
    words = [sys.executable, "-c", STARTING, *arguments]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stderr.count("UserWarning: of a library") == count


def _is_recent_glibc() -> bool:
    name, version = platform.libc_ver()
    return name == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)


FREEING = """
import resource
import numpy
from edadm_cli.cli.process_setup import keep_freed_memory
keep_freed_memory()
for _ in range(9):
    numpy.ones(12 << 20, numpy.float32)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(not _is_recent_glibc(), reason="other C libraries have other settings")
def test_memory_that_a_tensor_gave_back_serves_the_next_one() -> None:
    done = subprocess.run([sys.executable, "-c", FREEING], capture_output=True, text=True, check=True)
    faults = [int(line) for line in done.stdout.split()]
    assert faults[-1] - faults[1] < 100, "48 MiB have 12,288 pages"


def test_glibc_that_takes_no_more_gets_32_mib(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a number of ours for large blocks, the other one would make everything above 128 KiB slower."""
    settings: dict[int, int] = {}

    def mallopt(name: int, value: int) -> int:
        if name == -3 and value > 32 << 20:
            return 0
        settings[name] = value
        return 1

    monkeypatch.setattr("ctypes.CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    keep_freed_memory()
    assert settings == {}, "what the user set stays"
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    keep_freed_memory()
    assert settings == {-3: 32 << 20, -1: 256 << 20}


def test_on_a_terminal_there_are_bars_with_literal_text() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-c", SCRIPT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        while chunk := _read(ours):  # while it runs: what a terminal holds is limited, and a slow machine draws more
            shown += chunk
        os.close(ours)
        assert process.communicate()[0] == b""
    assert process.returncode == 0
    assert b"units [bold]" in shown
    assert b"3/3" in shown
    assert shown.count(b"warning: take [care]") == 3


def test_notes_are_for_the_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    ConsoleReporter(bars=False, verbose=False).note("a detail")
    assert capsys.readouterr().err == ""
    ConsoleReporter(bars=False, verbose=True).note("a detail")
    assert capsys.readouterr().err == "a detail\n"


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:
        return b""
