"""`kill -9` in the middle of every stage: the same command finishes, with the bytes of an undisturbed run."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from edadm_cli.artifacts import RunFolder
from edadm_cli.cli.app import main
from tests.integration.fresh_interpreter import FreshInterpreter
from tests.integration.small_runs import run_config

BITS = "w4a8"
# Kills itself in the middle of the write that is asked for: the N-th file, or the manifest.
KILLED = """
import os, signal, sys
from pathlib import Path
run, when, *command = sys.argv[1:]
replace, written = os.replace, []
def replace_or_die(source, target):
    if Path(run).resolve() in Path(target).resolve().parents:
        written.append(Path(target).name)
        if str(len(written)) == when or written[-1] == when:
            os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = replace_or_die
from edadm_cli.cli.app import main
sys.exit(main(command))
"""
RECIPE = """
extends = "default"
[learn]
iterations = 4
batch_size = 4
"""
CONFIG = run_config(num_trajectories=6)
STAGES = {
    "collect": None,
    "select": None,
    "reconstruct": BITS,
    "export": BITS,
    "evaluate": BITS,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a configuration and a recipe."""
    place = tmp_path_factory.mktemp("killed")
    (place / "recipe.toml").write_text(RECIPE)
    (place / "edadm.toml").write_text(CONFIG.replace("recipe.toml", str(place / "recipe.toml")))
    return place


def _command(stage: str, model: Path, place: Path, run: Path) -> list[str]:
    model_options = ["--model", str(model)] if stage == "collect" else []
    model_options += ["--bits", BITS] if STAGES[stage] else []
    return [stage, *model_options, "--config", str(place / "edadm.toml"), "--run", str(run), "-q"]


def _payload(run: Path, stage: str) -> dict[str, str]:
    artifact = RunFolder(run).open(stage, STAGES[stage])
    return {entry.path: entry.sha256 for entry in artifact.manifest.payload}


def test_a_killed_chain_ends_like_an_undisturbed_one(
    tiny_ddpm: Path, place: Path, fresh_interpreter: FreshInterpreter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    calm, disturbed = place / "calm", place / "disturbed"
    for stage, name in STAGES.items():
        assert main(_command(stage, tiny_ddpm, place, calm)) == 0
        command = _command(stage, tiny_ddpm, place, disturbed)
        for when in ("2", "manifest.json"):
            code = fresh_interpreter.run(KILLED, disturbed, when, *command, cwd=place)
            assert code == -signal.SIGKILL, f"{stage} was not killed at {when}"
            assert not RunFolder(disturbed).has(stage, name), "what is not complete is not there"
        assert main(command) == 0
        assert _payload(disturbed, stage) == _payload(calm, stage), stage
        partial = [path.name for path in RunFolder(disturbed).path(stage, name).parent.glob(".*.partial-*")]
        assert partial == [], stage
    assert main(["inspect", str(disturbed), "-q"]) == 0
    identities = [RunFolder(run).open("evaluate", BITS).identity for run in (calm, disturbed)]
    assert identities[0] == identities[1]
