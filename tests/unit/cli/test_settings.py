"""Where a setting comes from: flags over the file's table over its top level over the defaults."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from edadm_cli.cli import chain, measure, quality
from edadm_cli.cli import stages as chain_stages
from edadm_cli.cli.app import main
from edadm_cli.cli.settings import STAGES
from tests.unit.cli.conftest import FakeStages

CONFIG = """
seed = 7
bits = "w8a8"
recipe = "q-diffusion"
batch_size = 16

[collect]
num_trajectories = 12
batch_size = 4

[select]
num_samples = 6
"""


@pytest.fixture
def config(tmp_path: Path) -> list[str]:
    path = tmp_path / "edadm.toml"
    path.write_text(CONFIG)
    return ["--config", str(path)]


def test_flags_override_the_table_and_the_table_the_top_level(stages: FakeStages, config: list[str]) -> None:
    assert main(["collect", "--model", "tiny", "--seed", "9", *config]) == 0
    collect = stages.config("collect")
    assert (collect.seed, collect.num_trajectories, collect.batch_size) == (9, 12, 4)
    assert main(["select", *config]) == 0
    select = stages.config("select")
    assert (select.seed, select.num_samples, select.strategy) == (7, 6, "uniform")
    assert main(["select", *config, "--strategy", "random", "--force"]) == 0
    assert stages.config("select").strategy == "random"
    assert main(["reconstruct", *config]) == 0
    reconstruct = stages.config("reconstruct")
    assert (str(reconstruct.bits), reconstruct.recipe.name, reconstruct.batch_size) == (
        "w8a8",
        "q-diffusion",
        16,
    )
    assert main(["reconstruct", *config, "--bits", "w4a8", "--recipe", "rtn"]) == 0
    assert stages.config("reconstruct").recipe.name == "rtn"


def test_run_takes_the_same_file(stages: FakeStages, config: list[str]) -> None:
    assert main(["run", "--model", "tiny", *config]) == 0
    assert stages.config("collect").num_trajectories == 12
    assert str(stages.config("evaluate").bits) == "w8a8"


@pytest.mark.parametrize(
    ("text", "code", "named"),
    [
        ("nonsense = 1", 2, "nonsense"),
        ("[collect]\nnonsense = 1", 2, "collect.nonsense"),
        ("[select]\nnum_steps = 3", 2, "select.num_steps"),
        ("[bench]\nx = 1", 2, "bench"),
        ("select = 3", 2, "select"),
        ("[collect]\nnum_steps = 'many'", 2, "--num-steps"),
        ("[collect]\nnum_steps = 0", 2, "--num-steps"),
        ("[collect", 3, "TOML"),
        ("\xff", 3, "TOML"),
    ],
)
def test_a_file_that_does_not_fit_is_told(
    stages: FakeStages, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, code: int, named: str
) -> None:
    path = tmp_path / "edadm.toml"
    path.write_bytes(text.encode("latin-1"))
    assert main(["collect", "--model", "tiny", "--config", str(path)]) == code
    assert named in capsys.readouterr().err
    assert stages.calls == []


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["collect"], 2),
        (["collect", "--model", "tiny", "--num-steps", "0"], 2),
        (["collect", "--model", "tiny", "--num-steps", "x"], 2),
        (["collect", "--model", "tiny", "--dtype", "int4"], 2),
        (["collect", "--model", "tiny", "--seed", "-1"], 2),
        (["collect", "--model", "tiny", "--config", "absent.toml"], 3),
        (["collect", "--model", "tiny", "--json", "--quiet"], 2),
        (["collect", "--model", "///"], 2),
        (["select", "--recipe", "nonsense", "--run", "r"], 2),
        (["select", "--strategy", "nonsense", "--run", "r"], 2),
        (["reconstruct", "--run", "r"], 2),
        (["run", "--model", "tiny"], 2),
        (["bench"], 3),
        (["--nonsense"], 2),
    ],
)
def test_command_lines_that_cannot_be_are_refused_before_any_work(
    stages: FakeStages, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int
) -> None:
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    assert stages.calls == []


def test_every_field_of_a_configuration_is_a_flag() -> None:
    commands = {
        "collect": chain_stages.collect,
        "select": chain_stages.select,
        "reconstruct": chain_stages.reconstruct,
        "export": chain_stages.export,
        "evaluate": quality.evaluate,
        "sample": quality.sample,
        "bench": measure.bench,
    }
    assert commands.keys() == STAGES.keys()
    for name, command in commands.items():
        assert STAGES[name].model_fields.keys() - inspect.signature(command).parameters.keys() == set(), name
    assert {"model", "bits", "recipe", "seed", "device"} <= inspect.signature(chain.run).parameters.keys()
