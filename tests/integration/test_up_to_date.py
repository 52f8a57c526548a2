"""A stage that is up to date answers at once: it compares hashes, and imports no library that computes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edadm_cli.cli.app import main

PROBE = """
import contextlib, io, json, sys
from edadm_cli.cli.app import main
with contextlib.redirect_stdout(io.StringIO()) as text:
    code = main(json.loads(sys.argv[1]))
heavy = {"torch", "numpy", "diffusers", "transformers", "PIL", "matplotlib"}
print(json.dumps([code, json.loads(text.getvalue())["status"], sorted(heavy & set(sys.modules))]))
"""


@pytest.fixture(scope="module")
def run_folder(tiny_ddpm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("up-to-date") / "run"
    common = ["--run", str(folder), "--quiet"]
    size = ["--num-trajectories", "4", "--num-steps", "3", "--batch-size", "4"]
    assert main(["collect", "--model", str(tiny_ddpm), *size, *common]) == 0
    assert main(["select", "--strategy", "uniform", *common]) == 0
    assert main(["reconstruct", "--bits", "w4a8", "--recipe", "rtn", *common]) == 0
    assert main(["export", "--parity-samples", "1", *common]) == 0
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ["select", "--strategy", "uniform"],
        ["reconstruct", "--bits", "w4a8", "--recipe", "rtn"],
        ["export", "--parity-samples", "1"],
    ],
)
def test_nothing_that_computes_is_imported_for_a_stage_that_is_up_to_date(run_folder: Path, words: list[str]) -> None:
    arguments = json.dumps([*words, "--run", str(run_folder), "--json"])
    done = subprocess.run([sys.executable, "-c", PROBE, arguments], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [0, "up_to_date", []]
