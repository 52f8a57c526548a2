"""What the survival tests share: how a failure looks, what a folder holds, and ways to damage a file."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path

import pytest

from edadm_cli.cli.app import main

Capture = pytest.CaptureFixture[str]
OPTIONS = ["--num-trajectories", "4", "--num-steps", "3", "--batch-size", "2", "--device", "cpu"]
# The working folder changes in these tests; the package must be found all the same.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}


def failure(capsys: Capture, arguments: list[str], code: int) -> str:
    """Run a command that must fail: one sentence and a hint on stderr, nothing else; gives them."""
    capsys.readouterr()
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0].startswith("error: "), captured.err
    assert len(lines) <= 2, captured.err
    assert all(line.startswith("hint: ") for line in lines[1:])
    return captured.err


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    }


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(bytes(content))


def put_a_foreign_file(path: Path) -> None:
    import torch

    from edadm_cli.artifacts import save_tensors

    save_tensors(path, {"other": torch.zeros(3)})


def put_a_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"latents": [1, 2, 3]}))
