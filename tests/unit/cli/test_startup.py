"""`edadm --help` is instant because nothing heavy is imported for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from edadm_cli.version import __version__

HEAVY = (
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "numpy",
    "matplotlib",
    "open_clip",
    "torch_fidelity",
)
PROBE = """
import contextlib, io, json, sys
from edadm_cli.cli.app import main
with contextlib.redirect_stdout(io.StringIO()) as text:
    code = main(json.loads(sys.argv[1]))
print(json.dumps({"code": code, "text": text.getvalue(), "modules": sorted(sys.modules)}))
"""


def _probe(*arguments: str, code: int = 0) -> tuple[str, set[str]]:
    command = [sys.executable, "-c", PROBE, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["code"] == code
    return result["text"], set(result["modules"])


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], ["run", "--help"], ["evaluate", "-h"]])
def test_nothing_heavy_is_imported_for_help(arguments: list[str]) -> None:
    text, modules = _probe(*arguments)
    assert text
    assert not modules & set(HEAVY)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["push"], 2),
        (["reconstruct", "--bits", "w4", "--run", "nowhere"], 2),
        (["select", "--strategy", "nonsense", "--run", "nowhere"], 2),
        (["collect", "--model", "digit-sd", "--run", "nowhere"], 3),
        (["collect", "--model", "digits-sd", "--height", "32", "--run", "nowhere"], 2),
        (["select", "--run", "nowhere"], 3),
        (["export", "--bits", "w4a8", "--run", "nowhere"], 3),
        (["evaluate", "--bits", "w4a8", "--run", "nowhere"], 3),
        (["sample", "--bits", "w4a8", "--run", "nowhere"], 3),
    ],
)
def test_nothing_heavy_is_imported_to_refuse_a_command(arguments: list[str], code: int) -> None:
    _, modules = _probe(*arguments, code=code)
    assert not modules & set(HEAVY)


def test_help_is_instant() -> None:
    """Within 0.4 s of processor time; on a slow machine, within a multiple of what an empty program takes."""
    empty = "import typer; app = typer.Typer(); app.command()(lambda: 0); app(['--help'], standalone_mode=0)"
    ours = "from edadm_cli.cli.app import main; main(['--help'])"
    pairs = [(_processor_seconds(empty), _processor_seconds(ours)) for _ in range(3)]
    assert min(pair[1] for pair in pairs) < max(0.4, 4 * min(pair[0] for pair in pairs))


def _processor_seconds(work: str) -> float:
    script = f"import resource; {work}; print(resource.getrusage(resource.RUSAGE_SELF).ru_utime)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def test_version_is_that_of_the_package() -> None:
    text, _ = _probe("--version")
    assert text.strip() == f"edadm {__version__}"


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("edadm exp", ["export"]),
        ("edadm export --text-encoders ", ["float", "int8"]),
        ("edadm collect --dtype b", ["bfloat16"]),
        ("edadm reconstruct --recipe q", ["q-diffusion", "quick"]),
    ],
)
def test_a_shell_completes_commands_and_values(line: str, offered: list[str]) -> None:
    place = str(len(line.split(" ")) - 1)
    completing = {"_EDADM_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": place}
    command = [sys.executable, "-c", "from edadm_cli.cli.app import main; main()"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **completing})
    assert done.stdout.split() == offered


def test_the_help_names_options_whole_in_a_narrow_terminal() -> None:
    command = [sys.executable, "-c", "from edadm_cli.cli.app import main; main(['export', '--help'])"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "40"})
    assert "--parity-samples" in done.stdout
    assert "…" not in done.stdout


@pytest.mark.parametrize("words", [[], ["inspect"]])
def test_the_help_shows_no_type_behind_a_switch(words: list[str]) -> None:
    script = f"from edadm_cli.cli.app import main; main({[*words, '--help']!r})"
    command, environment = [sys.executable, "-c", script], {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "--help" in done.stdout
    assert "<bool>" not in done.stdout
