"""Where a setting comes from: flags over the file's table over its top level over the defaults."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import edadm_cli
from edadm_cli.cli.app import COMMANDS, main
from edadm_cli.cli.settings import STAGES, build_config, read_config_file
from edadm_cli.config import BitWidth, ReconstructConfig, SampleConfig
from edadm_cli.errors import UsageError
from edadm_cli.recipe import load_recipe
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
    ("text", "named"),
    [
        ("nonsense = 1", "nonsense"),
        ("[collect]\nnonsense = 1", "collect.nonsense"),
        ("[select]\nnum_steps = 3", "select.num_steps"),
        ("[bench]\nx = 1", "bench"),
        ("select = 3", "select"),
        ("[collect]\nnum_steps = 'many'", "--num-steps"),
        ("[collect]\nnum_steps = 0", "--num-steps"),
        ("[collect]\nguidance_scale = inf", "--guidance-scale"),
        ("[run]\nseed = 1", "the stages are collect, select"),
        ("[colect]\nseed = 1", "did you mean 'collect'?"),
        ("[collect", "TOML"),
        ("\xff", "TOML"),
    ],
)
def test_a_file_that_does_not_fit_is_reported(
    stages: FakeStages, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, named: str
) -> None:
    path = tmp_path / "edadm.toml"
    path.write_bytes(text.encode("latin-1"))
    assert main(["collect", "--model", "tiny", "--config", str(path)]) == 2
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
        (["collect", "--model", "tiny", "--guidance-scale", "inf"], 2),
        (["collect", "--model", "tiny", "--guidance-scale", "nan"], 2),
        (["collect", "--model", "tiny", "--num-trajectories", "1000001"], 2),
        (["select", "--variety-weight", "inf", "--run", "r"], 2),
        (["sample", "--bits", "w4a8", "--num-images", "99999999999999999999", "--run", "r"], 2),
        (["collect", "--model", "tiny", "--config", "absent.toml"], 2),
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


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[reconstruct]\nbits = 48", "got '48'"),
        ("[reconstruct]\nbits = ['w4a8', 'w8a8']", "--bits takes one width here"),
        ("[reconstruct]\nbits = 'auto:99a8'", "2 to 8 each"),
        ("[reconstruct]\nbits = 'w4a8'\nrecipe = 5", "got 5"),
        ("[reconstruct]\nbits = 'w4a8'\n[reconstruct.recipe]\nname = 'mine'", "A recipe is given by its name"),
    ],
)
def test_a_width_or_a_recipe_of_another_form_is_reported(
    stages: FakeStages, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, named: str
) -> None:
    path = tmp_path / "edadm.toml"
    path.write_text(text)
    assert main(["reconstruct", "--run", "r", "--config", str(path)]) == 2
    assert named in capsys.readouterr().err
    assert stages.calls == []


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["collect"], "collect needs --model.", "edadm collect --model digits-sd"),
        (["bench", "--model", "tiny", "--batch-sizes", "2,0"], "--batch-sizes: input should be greater than 0", ""),
        (["evaluate", "--bits", "w4a8", "--run", "r", "--num-images", "1"], "--num-images: input should be", ""),
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_is_reported_by_its_flag(
    stages: FakeStages, capsys: pytest.CaptureFixture[str], arguments: list[str], error: str, hint: str
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {error}")
    assert hint in printed


@pytest.mark.parametrize(
    ("text", "key", "hint"),
    [
        ("[collect]\nnum_trajectoreis = 5", "collect.num_trajectoreis", "did you mean 'num_trajectories'?"),
        ("[colect]\nseed = 5", "colect", "did you mean 'collect'?"),
        ("[select]\nxyzzy = 5", "select.xyzzy", "edadm select --help"),
    ],
)
def test_a_misspelt_key_is_answered_with_the_known_one(tmp_path: Path, text: str, key: str, hint: str) -> None:
    (tmp_path / "edadm.toml").write_text(text)
    with pytest.raises(UsageError, match=key) as caught:
        read_config_file(tmp_path / "edadm.toml")
    assert caught.value.hint == hint


def test_an_argument_without_an_option_is_refused_in_our_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "digits-sd"]) == 2
    assert capsys.readouterr().err.startswith("error: edadm run does not take the argument 'digits-sd'.\n")


def test_a_file_may_have_a_table_for_every_stage(tmp_path: Path) -> None:
    tables = "".join(f"[{name}]\nseed = 3\n" for name in STAGES)
    (tmp_path / "edadm.toml").write_text(tables)
    packages = {path.parent.name for path in Path(edadm_cli.__file__).parent.glob("*/stage.py")}
    assert set(read_config_file(tmp_path / "edadm.toml")) == packages - {"artifacts", "report"}


def test_every_field_of_a_configuration_is_a_flag() -> None:
    for name, stage in STAGES.items():
        flags = _flags_in_help(name)
        for field in stage.config.model_fields:
            assert f"--{field.replace('_', '-')}" in flags, (name, field)
            assert stage.config.model_fields[field].description, "which is the help text"
    assert {"--model", "--bits", "--recipe", "--seed", "--device"} <= _flags_in_help("run")


def _flags_in_help(command: str) -> set[str]:
    return {flag for option in COMMANDS[command].load().params for flag in option.opts}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_examples_of_the_help_are_command_lines_of_its_command(name: str) -> None:
    command = COMMANDS[name].load()
    assert COMMANDS[name].examples
    for example in COMMANDS[name].examples:
        program, called, *arguments = shlex.split(example)
        assert (program, called) == ("edadm", name)
        command.make_context(name, arguments)  # fails for an option or a value that the command does not take


def test_a_field_of_a_file_has_the_short_forms_of_its_flag(stages: FakeStages, tmp_path: Path) -> None:
    """Both are read by the configuration, and nowhere else."""
    content = {"bits": "w8a8,w4a8", "batch_sizes": ["1", "4"], "size": "32x48"}
    file = build_config(STAGES["bench"], content, {})
    assert file.bits == (BitWidth(weight=8, activation=8), BitWidth(weight=4, activation=8))
    assert (file.batch_sizes, file.size) == ((1, 4), (32, 48))


def test_fields_that_came_later_do_not_change_an_identity_at_their_default() -> None:
    bits, recipe = BitWidth.parse("w4a8"), load_recipe("rtn")
    plain = ReconstructConfig(bits=bits, recipe=recipe).identity_fields()
    assert plain.keys() == {"bits", "recipe", "batch_size"}
    changed = ReconstructConfig(bits=bits, recipe=recipe, units=("mid.*",), matmul="tf32", memory_budget_mib=5)
    assert changed.identity_fields().keys() - plain.keys() == {"units", "matmul"}
    assert "engine" not in SampleConfig(bits=bits).identity_fields()
    assert "engine" in SampleConfig(bits=bits, engine="openvino").identity_fields()
