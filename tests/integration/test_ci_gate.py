"""examples/ci-gate.sh, run as a build would run it, on a tiny pipeline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.fresh_interpreter import FreshInterpreter

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "ci-gate.sh"
CONFIG = """
device = "cpu"
recipe = "rtn"

[collect]
num_trajectories = 4
num_steps = 2
batch_size = 2

[export]
parity_samples = 1

[evaluate]
num_images = 2
"""


MAIN = "import sys\nfrom edadm_cli.cli.app import main\nsys.exit(main())\n"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Prepares an `edadm` on the path that runs this interpreter, a configuration, and a separate run folder."""
    program = tmp_path / "bin" / "edadm"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{MAIN}")
    program.chmod(0o755)
    (tmp_path / "edadm.toml").write_text(CONFIG)
    return {
        **os.environ,
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "EDADM_RUN": str(tmp_path / "run"),
        "EDADM_CONFIG": str(tmp_path / "edadm.toml"),
    }


def _gate(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_gate_opens_and_closes_on_quality(
    tiny_ddpm: Path, environment: dict[str, str], fresh_interpreter: FreshInterpreter, tmp_path: Path
) -> None:
    fresh_interpreter.write_program(tmp_path / "bin" / "edadm", MAIN)  # it starts ten times
    done = _gate(environment, str(tiny_ddpm), "w8a8", "1", "10")
    assert done.returncode == 0, done.stderr
    assert "is reached" in done.stdout
    result = json.loads((Path(environment["EDADM_RUN"]) / "evaluation.json").read_text())
    assert [outcome["met"] for outcome in result["requirements"]] == [True, True]

    done = _gate(environment, str(tiny_ddpm), "w8a8", "1000", "10")
    assert done.returncode == 5, done.stderr
    assert "is NOT reached" in done.stderr
    result = json.loads((Path(environment["EDADM_RUN"]) / "evaluation.json").read_text())
    assert result["status"] == "up_to_date"
    assert [outcome["met"] for outcome in result["requirements"]] == [False, True]


def test_the_gate_passes_on_what_went_wrong(environment: dict[str, str], tmp_path: Path) -> None:
    assert _gate(environment, str(tmp_path / "absent"), "w8a8", "1", "10").returncode == 3
    usage = _gate(environment, "model")
    assert usage.returncode == 2
    assert "ci-gate.sh MODEL BITS" in usage.stderr
