"""Two processes on one run, and processes that die: nothing is mixed, nothing half-made counts as whole."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edadm_cli.artifacts import RunFolder
from edadm_cli.cli.app import main
from tests.integration.fresh_interpreter import FreshInterpreter
from tests.integration.survival.helpers import (
    ENVIRONMENT,
    OPTIONS,
    Capture,
    failure,
    hashes,
)

HOLDER = """
import sys, time
from pathlib import Path
from edadm_cli.artifacts import ModelRef, BuildSpec, RunFolder, save_json
run = RunFolder(Path(sys.argv[1]))
parents = tuple(run.open(kind) for kind in sys.argv[3:])
with run.build(BuildSpec(sys.argv[2], None, {}, 0, parents, ModelRef(id="m", fingerprint="f"))) as build:
    save_json(build.path / "shard.json", [])
    print("holding", flush=True)
    time.sleep(600)
"""
# A writer of 40 shards, which stops for good after the shard whose number it is given.
SLOW_WRITER = """
import os, sys, time
from pathlib import Path
from edadm_cli.artifacts import ModelRef, BuildSpec, RunFolder, save_json
run = RunFolder(Path(sys.argv[1]))
with run.build(BuildSpec("collect", None, {"shards": 40}, 0, (), ModelRef(id="m", fingerprint="f"))) as build:
    for index in range(0 if build.up_to_date else 40):
        path = build.path / f"shard-{index}.json"
        if not path.exists():
            save_json(path, [index] * 2000)
        print(index, flush=True)
        if [str(index)] == sys.argv[2:]:
            time.sleep(600)
    if not build.up_to_date:
        build.commit()
"""


@contextmanager
def _process(script: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", script, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_second_builder_is_told_who_is_at_it(run: Path, tiny_ddpm: Path, capsys: Capture) -> None:
    shutil.rmtree(run / "collect")
    before = hashes(run)
    again = ["collect", "--model", str(tiny_ddpm), *OPTIONS, "--run", str(run)]
    with _process(HOLDER, str(run), "collect") as holder:
        assert _first_line(holder) == "holding"
        message = failure(capsys, again, 3)
        assert f"is being written by another process (pid {holder.pid})" in message
    assert main([*again, "-q"]) == 0, "the lock ends with its process, also with kill -9"
    assert main(["inspect", str(run), "-q"]) == 0
    assert hashes(run / "select") == {
        name.removeprefix("select/"): value for name, value in before.items() if name.startswith("select/")
    }


def test_a_parent_is_not_replaced_while_its_child_is_built(run: Path, tiny_ddpm: Path, capsys: Capture) -> None:
    before = hashes(run / "collect")
    replace = ["collect", "--model", str(tiny_ddpm), *OPTIONS, "--seed", "5", "--run", str(run), "--force"]
    with _process(HOLDER, str(run), "reconstruct", "select", "collect") as holder:
        assert _first_line(holder) == "holding"
        assert "is being read by another process" in failure(capsys, replace, 3)
        assert main(["inspect", str(run), "-q"]) == 0, "reading is for everybody"
    assert hashes(run / "collect") == before


def test_two_writers_at_once_leave_one_whole_artifact(tmp_path: Path) -> None:
    """Of two writers, one builds, and the other gets an error or finds the artifact up to date."""
    for attempt in range(3):
        root = tmp_path / f"run-{attempt}"
        command = [sys.executable, "-c", SLOW_WRITER, str(root)]
        pair = [
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
            for _ in range(2)
        ]
        errors = [process.communicate()[1] for process in pair]
        assert [process.returncode for process in pair].count(0) >= 1
        for process, error in zip(pair, errors, strict=True):
            assert process.returncode == 0 or "being written by another process" in error
        assert len(RunFolder(root).open("collect").manifest.payload) == 40


def _write(root: Path) -> None:
    command = [sys.executable, "-c", SLOW_WRITER, str(root)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)


def test_a_killed_build_resumes_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    _write(whole)
    killed = tmp_path / "killed"
    for lines in (1, 15, 30):
        with _process(SLOW_WRITER, str(killed), str(lines + 5)) as process:  # it is killed while it writes
            for _ in range(lines):
                _first_line(process)
            process.send_signal(signal.SIGKILL)
        assert not RunFolder(killed).has("collect")
    _write(killed)
    expected = hashes(whole / "collect")
    actual = hashes(killed / "collect")
    del expected["manifest.json"], actual["manifest.json"]  # they contain the time
    assert actual == expected
    assert RunFolder(killed).open("collect").identity == RunFolder(whole).open("collect").identity
    assert [path.name for path in killed.iterdir() if "partial" in path.name] == []


def test_an_interrupted_command_exits_with_130_and_resumes(
    tiny_ddpm: Path, fresh_interpreter: FreshInterpreter, tmp_path: Path
) -> None:
    # a shell's background jobs, and so all that they start, begin with this signal ignored
    listening = "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    to_file = "os.dup2(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT), 2)"
    script = f"{listening}; {to_file}; from edadm_cli.cli.app import main; sys.exit(main(sys.argv[2:]))"
    arguments = ["collect", "--model", str(tiny_ddpm), "--num-trajectories", "2000", "--num-steps", "3",
                 "--batch-size", "1", "--device", "cpu", "--run", str(tmp_path / "run")]  # fmt: skip
    running = fresh_interpreter.start(script, tmp_path / "stderr", *arguments)
    deadline = time.monotonic() + 400  # ends a test that hangs
    while not list(tmp_path.glob("run/.collect.partial-*/latents-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(running.pid, signal.SIGINT)
    assert running.wait() == 130
    running.close()
    assert (tmp_path / "stderr").read_text() == "error: Interrupted.\nhint: the same command resumes where it was\n"
    assert list(tmp_path.glob("run/.collect.partial-*/latents-*")), "what was done is kept"
