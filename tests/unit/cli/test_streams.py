"""Standard streams that close, fill or break, signals, and limits of the machine: the exit code is that of the work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edadm_cli.cli.text import LONGEST_LINE, one_line

EDADM = f"{sys.executable} -m edadm_cli"
STANDING_IN = """
import atexit, os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell begin with it ignored
from edadm_cli.artifacts import Stage
from edadm_cli.cli.app import main
def work(*arguments, **options):
    os.write(1, b"working\\n")
    time.sleep(60)
if sys.argv[-1] == "late":
    del sys.argv[-1]
    atexit.register(lambda: (os.write(1, b"working\\n"), time.sleep(1)))
else:
    Stage.run = work
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("{edadm} --help | head -1", 0),
        ("{edadm} --version | true", 0),
        ("{edadm} models --json | true", 0),
        ("{edadm} models 2>&-", 0),
        ("{edadm} models 2>/dev/full", 0),
        ("{edadm} models >&-", 0),
        ("{edadm} models >/dev/full", 4),
        ("{edadm} nonsense 2>/dev/full", 2),
        ("{{ {edadm} nonsense 2>&1 >&3 | true; exit ${{PIPESTATUS[0]}}; }} 3>&1", 2),
    ],
)
def test_streams_decide_nothing_but_a_full_disk_under_the_result(command: str, code: int) -> None:
    script = f"set -o pipefail; {command.format(edadm=EDADM)}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    ("number", "code", "error"),
    [
        (signal.SIGINT, 130, "error: Interrupted.\nhint: the same command resumes where it was\n"),
        (signal.SIGTERM, 143, "error: Terminated by SIGTERM.\nhint: the same command resumes where it was\n"),
    ],
)
def test_a_signal_ends_a_stage_with_one_sentence(tmp_path: Path, number: int, code: int, error: str) -> None:
    assert _signalled(tmp_path, number, "collect", "--model", "tiny") == (code, error)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_work_changes_nothing(tmp_path: Path, number: int) -> None:
    assert _signalled(tmp_path, number, "--version", "late") == (0, "")


def _signalled(folder: Path, number: int, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-c", STANDING_IN, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=folder, text=True, **pipes) as process:  # type: ignore[call-overload]
        while "working" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(number)
        error = process.communicate()[1]
        return process.returncode, error


def test_a_limit_of_the_address_space_is_one_of_the_machine() -> None:
    script = f"ulimit -v 600000; {EDADM} engines"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 4, done
    assert done.stderr.startswith("error: ")
    assert "internal error" not in done.stderr


def test_a_limit_of_file_sizes_is_one_of_the_machine(tmp_path: Path) -> None:
    work = "from edadm_cli.artifacts import save_json; from pathlib import Path; save_json(Path('x'), 'x' * 100000)"
    script = f"import edadm_cli.cli.app as app; app.app = lambda **_: exec({work!r}); raise SystemExit(app.main())"
    command = ["bash", "-c", 'ulimit -f 8; exec "$0" -c "$1"', sys.executable, script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 4, done
    assert done.stderr.startswith("error: x: the file would be larger")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[96mThis is step 1/3\x1b[0m", "\\x1b[96mThis is step 1/3\\x1b[0m"),
        ("a\u202eb\ud800\x00\x9b", "a\\u202eb\\ud800\\x00\\x9b"),
        ("two\n\tlines", "two lines"),
        ("猫 é", "猫 é"),
    ],
)
def test_text_cannot_steer_a_terminal(text: str, shown: str) -> None:
    assert one_line(text) == shown


def test_overlong_names_and_messages_are_shortened() -> None:
    shown = one_line(f"no file {'x' * 10_000_000}y here")
    assert len(shown) < 500
    assert shown.startswith("no file xxx")
    assert len(one_line("many words " * 1000)) <= LONGEST_LINE
