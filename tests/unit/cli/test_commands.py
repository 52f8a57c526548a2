"""The commands: what they pass to the stages, what they print, and with what code they exit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edadm_cli.cli.app import main
from edadm_cli.errors import InputError
from tests.unit.cli.conftest import PEAKS_MIB, FakeStages


def _json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The one JSON object on stdout; anything else on stdout fails."""
    result = json.loads(capsys.readouterr().out)
    assert isinstance(result, dict)
    return result


def _chain(*bits: str) -> None:
    assert main(["collect", "--model", "tiny", "-q"]) == 0
    assert main(["select", "-q"]) == 0
    for width in bits:
        assert main(["reconstruct", "--bits", width, "-q"]) == 0
        assert main(["export", "-q"]) == 0


def test_the_chain_works_as_typed_in_a_shell(stages: FakeStages, capsys: pytest.CaptureFixture[str]) -> None:
    _chain("w4a8")
    assert main(["evaluate"]) == 0
    assert main(["sample"]) == 0
    assert main(["report"]) == 0
    assert [name for name, _, _ in stages.calls] == [
        "collect", "select", "reconstruct", "export", "evaluate", "sample",
    ]  # fmt: skip
    assert {run.root for _, _, run in stages.calls} == {Path("runs/tiny")}
    assert str(stages.config("export").bits) == "w4a8"
    assert "a library prints this" not in capsys.readouterr().out


def test_json_is_one_object_with_the_keys_of_every_command(
    stages: FakeStages, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["collect", "--model", "tiny", "--json"]) == 0
    result = _json(capsys)
    peaks = {"peak_memory_mib", "peak_cuda_memory_mib"}
    shared = {"command", "status", "run", "artifact", "identity", "seconds", "warnings"} | peaks
    assert set(result) == shared | {"model", "num_steps", "num_trajectories"}
    assert result["status"] == "done"
    assert result["artifact"] == "runs/tiny/collect"
    assert main(["collect", "--model", "tiny", "--json"]) == 0
    assert _json(capsys)["status"] == "up_to_date"


def test_quiet_prints_one_path_and_the_default_a_table(stages: FakeStages, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["collect", "--model", "tiny", "--quiet"]) == 0
    assert capsys.readouterr().out == "runs/tiny/collect\n"
    assert main(["collect", "--model", "tiny"]) == 0
    table = capsys.readouterr().out
    assert "runs/tiny/collect" in table
    assert "{" not in table


def test_numbers_that_json_lacks_are_null(stages: FakeStages, capsys: pytest.CaptureFixture[str]) -> None:
    _chain("w4a8")
    capsys.readouterr()
    assert main(["evaluate", "--json"]) == 0
    out = capsys.readouterr().out
    assert "NaN" not in out
    assert json.loads(out)["distance_to_full_precision"]["latent_rel_l2"] is None


def test_a_dry_run_estimates_and_leaves_no_trace(stages: FakeStages, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["collect", "--model", "tiny", "--dry-run", "--json"]) == 0
    result = _json(capsys)
    assert result["status"] == "planned"
    assert result["estimate"] == {"seconds": 2.0, "memory_mib": 100.0, "disk_mib": 3.0}
    assert result["peak_memory_mib"] > 0  # of the probe
    assert stages.calls == []
    assert list(Path().iterdir()) == []


def test_a_dry_run_of_the_chain_plans_what_it_cannot_probe_yet(
    stages: FakeStages, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--model", "tiny", "--bits", "w4a8", "--dry-run", "--json"]) == 0
    result = _json(capsys)
    assert result["status"] == "planned"
    assert result["collect"]["estimate"]["seconds"] == 2.0
    assert "estimate" not in result["results"]["w4a8"]["evaluate"]
    assert result["results"]["w4a8"]["evaluate"]["peak_memory_mib"] is None
    assert main(["run", "--model", "tiny", "--bits", "w4a8", "--dry-run"]) == 0
    table = capsys.readouterr().out
    for text in ("Time: about 2.0 s", "Memory: 100 MiB beyond the program itself", "Disk: 3 MiB"):
        assert text in table
    assert list(Path().iterdir()) == []


def test_a_dry_run_says_what_is_up_to_date_and_what_would_be_refused(
    stages: FakeStages, capsys: pytest.CaptureFixture[str]
) -> None:
    _chain("w4a8")
    calls = len(stages.calls)
    capsys.readouterr()
    assert main(["select", "--dry-run", "--json"]) == 0
    result = _json(capsys)
    assert (result["status"], result["artifact"]) == ("up_to_date", "runs/tiny/select")
    assert result["identity"] is not None
    assert "estimate" not in result
    assert main(["select", "--dry-run", "--force", "--json"]) == 0
    assert _json(capsys)["estimate"]["seconds"] == 2.0
    assert main(["select", "--dry-run", "--seed", "3"]) == 3
    assert "seed: 0 -> 3" in capsys.readouterr().err
    assert main(["evaluate", "--dry-run", "--require", "prompt_accuracy>=2"]) == 0
    assert len(stages.calls) == calls
    capsys.readouterr()
    assert main(["sample", "--dry-run", "--json"]) == 0
    assert _json(capsys)["status"] == "planned"
    assert main(["sample"]) == 0
    capsys.readouterr()
    assert main(["sample", "--dry-run", "--json"]) == 0
    result = _json(capsys)
    assert result["status"] == "up_to_date"
    assert "estimate" not in result
    assert main(["sample", "--dry-run", "--force", "--json"]) == 0
    assert _json(capsys)["status"] == "planned"


def test_a_dry_run_names_the_artifact_that_it_would_build(
    stages: FakeStages, capsys: pytest.CaptureFixture[str]
) -> None:
    _chain("w4a8")
    capsys.readouterr()
    assert main(["evaluate", "--engine", "openvino", "--dry-run", "--json"]) == 0
    assert _json(capsys)["artifact"] == "runs/tiny/evaluate/w4a8-openvino"
    assert main(["sample", "--dry-run", "--json"]) == 0
    assert _json(capsys)["artifact"] == "runs/tiny/samples/w4a8"


def test_a_dry_run_of_the_chain_skips_what_is_up_to_date(
    stages: FakeStages, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "--model", "tiny", "--bits", "w4a8", "--recipe", "rtn"]
    assert main(command) == 0
    capsys.readouterr()
    assert main([*command, "--dry-run", "--json", "--require", "prompt_accuracy>=2"]) == 0
    assert _json(capsys)["status"] == "up_to_date"
    assert main([*command, "--bits", "w8a8", "--dry-run", "--json"]) == 0
    result = _json(capsys)
    statuses = {bits: [stage["status"] for stage in by.values()] for bits, by in result["results"].items()}
    assert result["status"] == "planned"
    assert statuses == {"w4a8": ["up_to_date"] * 3, "w8a8": ["planned"] * 3}
    assert main([*command, "--seed", "1", "--dry-run"]) == 3
    assert "seed: 0 -> 1" in capsys.readouterr().err
    assert main([*command, "--seed", "1", "--force", "--dry-run", "--json"]) == 0
    assert _json(capsys)["results"]["w4a8"]["evaluate"]["status"] == "planned"


def test_run_with_the_quick_recipe_collects_few_trajectories_unless_told_otherwise(stages: FakeStages) -> None:
    command = ["run", "--model", "tiny", "--bits", "w8a8", "--recipe", "quick"]
    assert main(command) == 0
    assert (stages.config("collect").num_trajectories, stages.config("select").num_samples) == (8, 16)
    assert stages.config("reconstruct").recipe.learn.granularity == "none"
    assert main([*command, "--num-trajectories", "12", "--force"]) == 0
    assert stages.config("collect").num_trajectories == 12


def test_run_does_the_chain_for_each_bit_width_and_skips_what_is_up_to_date(
    stages: FakeStages, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "--model", "tiny", "--bits", "w8a8,w4a8", "--bits", "w4a8", "--recipe", "rtn", "--json"]
    assert main(command) == 0
    result = _json(capsys)
    assert list(result["results"]) == ["w8a8", "w4a8"]
    assert result["status"] == "done"
    assert result["select"]["peak_memory_mib"] == PEAKS_MIB["select"]
    assert result["peak_memory_mib"] == PEAKS_MIB["reconstruct"]  # the highest of all stages
    assert result["results"]["w4a8"]["export"]["size_mib"]["ratio"] == 8.0
    assert result["report"] == "runs/tiny/report.html"
    assert Path(result["report"]).read_text() == "<p>['w8a8', 'w4a8']</p>"
    assert stages.config("select").strategy == "uniform"  # the recipe's
    assert main(command) == 0
    assert _json(capsys)["status"] == "up_to_date"


def test_run_prints_a_table_with_every_bit_width(stages: FakeStages, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--model", "tiny", "--bits", "w8a8,w4a8"]) == 0
    table = capsys.readouterr().out
    for text in ("w8a8", "w4a8", "prompt_accuracy", "0.97", "report.html"):
        assert text in table


@pytest.mark.parametrize("wrong", [["--recipe", "nonsense"], ["--num-images", "0"], ["--bits", "w99a8"]])
def test_run_settles_every_stage_before_the_first_one_starts(
    stages: FakeStages, capsys: pytest.CaptureFixture[str], wrong: list[str]
) -> None:
    assert main(["run", "--model", "tiny", "--bits", "w4a8", *wrong]) == 2
    assert stages.calls == []


def test_a_warning_of_one_stage_is_not_one_of_the_next(stages: FakeStages, capsys: pytest.CaptureFixture[str]) -> None:
    stages.behaviour["collect"] = lambda reporter: reporter.warn("few trajectories")
    assert main(["run", "--model", "tiny", "--bits", "w4a8", "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["collect"]["warnings"] == ["few trajectories"]
    assert result["select"]["warnings"] == []
    assert result["warnings"] == ["few trajectories"]
    assert captured.err.count("warning: few trajectories") == 1


@pytest.mark.parametrize("bits", ["w9a8", "w4", "banana", "w1a8", "", "w4a8x", "w4a8,banana"])
@pytest.mark.parametrize("command", ["reconstruct", "run"])
def test_a_bit_width_that_is_none_is_a_usage_error(
    stages: FakeStages, capsys: pytest.CaptureFixture[str], command: str, bits: str
) -> None:
    model = ["--model", "tiny"] if command == "run" else []
    assert main([command, *model, "--bits", bits]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--bits" in captured.err
    assert "Traceback" not in captured.err
    assert stages.calls == []


def test_bit_widths_are_remembered_per_run(stages: FakeStages, capsys: pytest.CaptureFixture[str]) -> None:
    _chain("w4a8", "w8a8")
    assert main(["export"]) == 0
    assert str(stages.config("export").bits) == "w8a8"
    assert main(["reconstruct", "--bits", "w4a8"]) == 0
    assert main(["evaluate"]) == 0
    assert str(stages.config("evaluate").bits) == "w4a8"


def test_a_memory_that_is_no_bit_width_is_named(stages: FakeStages, capsys: pytest.CaptureFixture[str]) -> None:
    _chain("w4a8")
    memory = Path("runs/tiny/.latest")
    memory.write_text("banana")
    assert main(["export"]) == 3
    assert f"{memory} holds 'banana' and not the bit width" in capsys.readouterr().err


def test_several_bit_widths_without_a_memory_must_be_named(
    stages: FakeStages, capsys: pytest.CaptureFixture[str]
) -> None:
    _chain("w4a8", "w8a8")
    Path("runs/tiny/.latest").unlink()
    assert main(["evaluate"]) == 2
    assert "w4a8, w8a8" in capsys.readouterr().err


def test_run_folders_are_found_in_the_documented_order(
    stages: FakeStages, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["select"]) == 3
    assert "edadm collect" in capsys.readouterr().err
    assert main(["collect", "--model", "tiny"]) == 0
    assert main(["collect", "--model", "owner/name", "--run", "elsewhere"]) == 0
    assert main(["select"]) == 0
    assert stages.run("select") == Path("elsewhere")
    assert main(["select", "--run", "runs/tiny"]) == 0
    assert main(["reconstruct", "--bits", "w4a8"]) == 0
    assert stages.run("reconstruct") == Path("runs/tiny")
    monkeypatch.setenv("EDADM_RUN", "from-variable")
    assert main(["collect", "--model", "tiny"]) == 0
    assert stages.run("collect") == Path("from-variable")
    assert main(["collect", "--model", "tiny", "--run", "flag"]) == 0
    assert stages.run("collect") == Path("flag")
    monkeypatch.delenv("EDADM_RUN")
    assert main(["select"]) == 0
    assert stages.run("select") == Path("runs/tiny")
    assert main(["collect", "--model", "owner/other"]) == 0
    assert stages.run("collect") == Path("runs/owner--other")


def test_a_run_that_is_gone_is_reported(stages: FakeStages, capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs").mkdir()
    Path("runs/.latest").write_text("runs/gone\n")
    assert main(["select"]) == 3
    assert "runs/gone" in capsys.readouterr().err


def test_a_working_folder_without_room_for_a_memory_is_no_obstacle(
    stages: FakeStages, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("runs").write_text("a file is in the way")
    assert main(["collect", "--model", "tiny", "--run", "r", "-q"]) == 0
    assert capsys.readouterr().out == "r/collect\n"
    assert main(["select", "--run", "r", "-v"]) == 0
    assert "not remembered" in capsys.readouterr().err


def test_a_missing_stage_names_the_command_that_makes_it(
    stages: FakeStages, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["collect", "--model", "tiny"]) == 0
    capsys.readouterr()
    assert main(["reconstruct", "--bits", "w4a8", "--json"]) == 3
    captured = capsys.readouterr()
    failure = json.loads(captured.out)
    assert failure == {
        "command": "reconstruct",
        "status": "failed",
        "error": "There is no 'select' artifact in the run runs/tiny.",
        "hint": "edadm select --run runs/tiny",
        "exit_code": 3,
    }
    assert "hint: edadm select --run runs/tiny" in captured.err


def test_require_gates_after_the_result_is_printed(stages: FakeStages, capsys: pytest.CaptureFixture[str]) -> None:
    _chain("w4a8")
    capsys.readouterr()
    assert main(["evaluate", "--json", "--require", "prompt_accuracy>=0.9"]) == 0
    assert _json(capsys)["requirements"] == [{"require": "prompt_accuracy>=0.9", "value": 0.97, "met": True}]
    unmet = ["--require", "prompt_accuracy >= 0.99", "--require", "distance_to_full_precision.psnr_db>30"]
    assert main(["evaluate", "--json", *unmet]) == 5
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["status"] == "up_to_date"
    assert [outcome["met"] for outcome in result["requirements"]] == [False, True]
    assert "prompt_accuracy >= 0.99 (got 0.97)" in captured.err


def test_require_of_run_holds_for_each_bit_width(stages: FakeStages, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", "--model", "tiny", "--bits", "w8a8,w4a8", "--json", "--require"]
    assert main([*command, "prompt_accuracy>=0.99"]) == 5
    assert [outcome["bits"] for outcome in _json(capsys)["requirements"]] == ["w8a8", "w4a8"]
    assert main([*command, "prompt_accuracy>=0.9"]) == 0


@pytest.mark.parametrize("text", ["", "prompt_accuracy", "prompt_accuracy=>1", ">=1", "a>=b", "a>=nan", "a>=1 b"])
def test_a_requirement_that_does_not_parse_stops_before_any_work(
    stages: FakeStages, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    _chain("w4a8")
    assert main(["evaluate", "--require", text]) == 2
    assert "evaluate" not in [name for name, _, _ in stages.calls]


def test_a_requirement_on_an_unknown_metric_is_a_usage_error(
    stages: FakeStages, capsys: pytest.CaptureFixture[str]
) -> None:
    _chain("w4a8")
    assert main(["evaluate", "--require", "speedup>=2"]) == 2
    assert "metrics.prompt_accuracy" in capsys.readouterr().err
    assert main(["evaluate", "--require", "psnr_db>=2"]) == 2
    assert "hint: did you mean 'distance_to_full_precision.psnr_db'?" in capsys.readouterr().err


def test_an_unknown_metric_does_not_lose_the_result(stages: FakeStages, capsys: pytest.CaptureFixture[str]) -> None:
    _chain("w4a8")
    capsys.readouterr()
    required = ["--require", "prompt_accuracy>=0.9", "--require", "speedup>=2"]
    assert main(["evaluate", "--json", *required]) == 2
    captured = capsys.readouterr()
    outcomes = json.loads(captured.out)["requirements"]
    assert outcomes[1] == {"require": "speedup>=2", "value": None, "met": False}
    assert [outcome["met"] for outcome in outcomes] == [True, False]
    assert "has no number 'speedup'" in captured.err
    assert main(["run", "--model", "tiny", "--bits", "w8a8,w4a8", "--json", "--require", "speedup>=2"]) == 2
    assert [outcome["bits"] for outcome in _json(capsys)["requirements"]] == ["w8a8", "w4a8"]


def test_failures_inside_a_stage_keep_the_run_folder_whole(
    stages: FakeStages, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(reporter: Any) -> None:
        raise InputError("The model is broken.")

    stages.behaviour["select"] = fail
    assert main(["run", "--model", "tiny", "--bits", "w4a8"]) == 3
    assert "error: The model is broken." in capsys.readouterr().err
    del stages.behaviour["select"]
    assert main(["run", "--model", "tiny", "--bits", "w4a8", "-q"]) == 0
    assert capsys.readouterr().out == "runs/tiny/report.html\n"
