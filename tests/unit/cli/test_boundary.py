"""The error boundary: any exception ends as one sentence, an exit code, and at most one JSON object."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from edadm_cli.artifacts import CollectRecord
from edadm_cli.cli.app import main
from edadm_cli.cli.boundary import explain
from edadm_cli.cli.text import one_line
from edadm_cli.config import CollectConfig
from edadm_cli.errors import InputError, MachineError, RequirementError, UsageError
from tests.unit.cli.conftest import FakeStages


def _invalid(make: Callable[[], Any]) -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        make()
    return caught.value


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UsageError("no."), 2, "no."),
        (InputError("no."), 3, "no."),
        (MachineError("no."), 4, "no."),
        (RequirementError("no."), 5, "no."),
        (OSError(errno.ENOSPC, "x", "/d"), 4, "/d: the disk is full."),
        (PermissionError(errno.EACCES, "x", "/d"), 4, "/d: permission is denied."),
        (OSError(errno.EROFS, "x", "/d"), 4, "/d: the file system is read-only."),
        (FileNotFoundError(errno.ENOENT, "x", "/d"), 3, "/d: there is no such file or folder."),
        (NotADirectoryError(errno.ENOTDIR, "x", "/d"), 3, "/d: a folder was expected, and there is a file."),
        (IsADirectoryError(errno.EISDIR, "x", "/d"), 3, "/d: a file was expected, and this is a folder."),
        (OSError(errno.EPERM, "x"), 4, "the operation is not permitted."),
        (OSError(errno.ETIMEDOUT, "x", "/d"), 4, "/d: the file server does not answer."),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/d']"), 4, "temporary files"),
        (MemoryError(), 4, "memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), 4, "memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 4, "memory"),
        (_invalid(lambda: CollectConfig(model="m", num_steps=0)), 2, "--num-steps"),
        (_invalid(lambda: CollectConfig(model="m", nonsense=1)), 2, "'nonsense'"),
        (_invalid(lambda: CollectRecord(status="done")), 1, "internal error: ValidationError"),
        (RuntimeError("first\nsecond"), 1, "internal error: RuntimeError: first second"),
        (OSError(errno.EDEADLK, "strange"), 1, "internal error: OSError"),
        (OSError(errno.ELOOP, "circle", "a"), 3, "a: its symbolic links lead in a circle"),
        (RuntimeError("Symlink loop from '/a'"), 3, "'/a': its symbolic links lead in a circle"),
        (ModuleNotFoundError("no", name="torch_fidelity.registry"), 4, "needs the package 'torch_fidelity'"),
        (RecursionError("deep"), 1, "internal error: RecursionError"),
    ],
)
def test_each_exception_has_its_sentence_and_code(
    stages: FakeStages, capsys: pytest.CaptureFixture[str], error: Exception, code: int, text: str
) -> None:
    def fail(reporter: Any) -> None:
        raise error

    stages.behaviour["collect"] = fail
    assert main(["collect", "--model", "tiny", "--json"]) == code
    captured = capsys.readouterr()
    failure = json.loads(captured.out)
    assert failure["exit_code"] == code
    assert failure["status"] == "failed"
    assert failure["command"] == "collect"
    assert text in failure["error"]
    assert "Traceback" not in captured.err
    assert f"\nerror: {failure['error']}\n" in captured.err
    assert main(["collect", "--model", "tiny", "--verbose"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_an_interruption_is_130_and_says_that_the_command_resumes(
    stages: FakeStages, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(reporter: Any) -> None:
        raise KeyboardInterrupt

    stages.behaviour["collect"] = interrupt
    assert main(["collect", "--model", "tiny", "--json"]) == 130
    captured = capsys.readouterr()
    assert json.loads(captured.out)["exit_code"] == 130
    assert "resumes" in captured.err


def test_text_of_a_user_cannot_steer_the_terminal_or_the_markup(
    stages: FakeStages, capsys: pytest.CaptureFixture[str]
) -> None:
    nasty = "[red]x[/red] \x1b[2J <script> [/]"

    def warn(reporter: Any) -> None:
        reporter.warn(nasty)

    stages.behaviour["collect"] = warn
    assert main(["collect", "--model", nasty, "--run", "r"]) == 0
    captured = capsys.readouterr()
    assert "\x1b[2J" not in captured.out + captured.err
    assert "[red]x[/red]" in captured.out
    assert "[red]x[/red]" in captured.err
    error = explain(InputError(nasty))
    assert one_line(error.message) == "[red]x[/red] \\x1b[2J <script> [/]"


def test_a_reader_that_goes_away_is_no_failure() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", "import sys; from edadm_cli.cli.app import main; sys.exit(main())"]
    done = subprocess.run([*command, "models", "--json"], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("openvino", "pip install openvino"),
        ("open_clip", "pip install open_clip_torch"),
        ("torch_fidelity", "pip install torch-fidelity"),
        ("matplotlib.figure", "pip install matplotlib"),
        ("onnxruntime", "pip install 'edadm[onnx]'"),
    ],
)
def test_a_package_that_is_not_installed_comes_with_the_line_that_installs_it(module: str, command: str) -> None:
    explained = explain(ModuleNotFoundError(f"No module named '{module}'", name=module))
    assert isinstance(explained, MachineError)
    assert explained.hint == command
