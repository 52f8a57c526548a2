"""`inspect` and `models`: what is there, what it descends from, and whether it is whole."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from edadm_cli.cli.app import main
from edadm_cli.cli.tables import render
from tests.unit.cli.conftest import FakeStages

RUN = Path("runs/tiny")


@pytest.fixture(autouse=True)
def run(stages: FakeStages, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--model", "tiny", "--bits", "w8a8,w4a8", "-q"]) == 0
    capsys.readouterr()


def _inspect(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert main(["inspect", *arguments, "--json"]) == code
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_the_lineage_leads_from_an_export_to_the_trajectories(capsys: pytest.CaptureFixture[str]) -> None:
    result = _inspect(capsys, str(RUN / "export" / "w4a8"))
    actual = [(artifact["kind"], artifact["name"]) for artifact in result["artifacts"]]
    assert actual == [("export", "w4a8"), ("reconstruct", "w4a8"), ("select", None), ("collect", None)]
    for child, parent in zip(result["artifacts"], result["artifacts"][1:], strict=False):
        assert child["parents"][0]["identity"] == parent["identity"]
    assert result["identity"] == result["artifacts"][0]["identity"]
    assert result["artifacts"][0]["payload"][0]["path"] == "data.json"


def test_a_run_shows_everything_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    result = _inspect(capsys)
    assert len(result["artifacts"]) == 8
    assert all(artifact["intact"] for artifact in result["artifacts"])
    assert main(["inspect"]) == 0
    assert "reconstruct" in capsys.readouterr().out
    assert main(["inspect", str(RUN / "collect")]) == 0
    assert "data.json" in capsys.readouterr().out


@pytest.mark.parametrize("columns", ["1", "20", "-5", "many"])
def test_a_table_is_never_too_narrow_for_its_content(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["inspect"]) == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"\b{part}", text) for part in ("collect", "w4a8", "intact"))
    assert len(text.splitlines()) < 100


def test_a_narrow_terminal_breaks_no_short_word(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["inspect"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"│ reconstruct +│ w4a8 +│ [0-9a-f]{12} │", text)
    assert "problem" not in text, "nothing is wrong, so the column would be empty"


def test_tensors_are_counted_by_element_type_in_the_table() -> None:
    tensors = {f"layer{place}.weight": {"dtype": "I8", "shape": [2, 3]} for place in range(2000)}
    tensors["layer0.scale"] = {"dtype": "F32", "shape": []}
    file = {"path": "unet/model.safetensors", "bytes": 12345, "tensors": tensors}
    artifact: dict[str, Any] = {
        "path": "a",
        "kind": "export",
        "name": "w4a8",
        "identity": "0" * 64,
        "parents": [],
        "payload": [file],
    }
    artifact |= {"model": {"id": "tiny"}, "seed": 0, "config": {}}
    console = Console(width=120, file=(written := io.StringIO()))
    for part in render({"command": "inspect", "run": None, "artifact": "a", "artifacts": [artifact]}):
        console.print(part)
    text = written.getvalue()
    assert "1 F32, 2,000 I8" in text
    assert len(text.splitlines()) < 30
    assert "--json" in text


def test_a_moved_artifact_is_still_checked(capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(RUN / "export" / "w4a8", "deployed")
    result = _inspect(capsys, "deployed")
    assert result["artifacts"][0]["kind"] == "export"
    assert result["run"] is None
    Path("deployed/data.json").write_text("{}")
    assert _inspect(capsys, "deployed", code=3)["status"] == "failed"


@pytest.mark.parametrize("damage", ["payload", "manifest", "parent"])
def test_damage_is_shown_and_exits_with_3(capsys: pytest.CaptureFixture[str], damage: str) -> None:
    if damage == "payload":
        (RUN / "select" / "data.json").write_text("{}")
    elif damage == "manifest":
        path = RUN / "select" / "manifest.json"
        path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    else:
        assert main(["collect", "--model", "tiny", "--num-steps", "3", "--force", "-q"]) == 0
        capsys.readouterr()
    result = _inspect(capsys, str(RUN), code=3)
    broken = [artifact for artifact in result["artifacts"] if not artifact["intact"]]
    assert broken[0]["kind"] == "select"
    assert broken[0]["hint"] == "edadm select --run runs/tiny --force"
    assert result["error"] == broken[0]["problem"]
    assert result["exit_code"] == 3
    assert main(["inspect", str(RUN)]) == 3
    captured = capsys.readouterr()
    assert "error:" in captured.err
    assert "select" in captured.out


def test_a_path_that_is_not_utf_8_is_printed_in_its_own_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = os.fsdecode(b"run\xff")
    shutil.copytree(RUN, folder)
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "utf-8"))
    assert main(["inspect", folder, "--quiet"]) == 0
    assert written.getvalue() == b"run\xff\n"
    assert main(["inspect", folder]) == 0
    assert b"run\\udcff" in written.getvalue(), "tables are for people"
    Path(folder).rename("red\x1b[31m")
    assert main(["inspect", "red\x1b[31m"]) == 0
    assert b"\x1b" not in written.getvalue()


@pytest.mark.parametrize("path", ["absent", ".", "a" * 5000])
def test_what_is_no_artifact_is_reported(capsys: pytest.CaptureFixture[str], path: str) -> None:
    assert main(["inspect", path]) == 3
    assert "error:" in capsys.readouterr().err


def test_models_lists_every_known_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["models"]
    assert {"digits-sd", "digits-ddpm"} <= {row["name"] for row in rows}
    assert {row["source"] for row in rows} == {"shipped", "hub", "compvis", "assembled", "random"}
    assert all(row["available"] for row in rows if row["source"] in ("shipped", "random"))
    assert all(isinstance(row["available"], bool) for row in rows)
    assert main(["models"]) == 0
    assert "digits-sd" in capsys.readouterr().out
    assert main(["models", "-q"]) == 0
    assert capsys.readouterr().out.split() == [row["name"] for row in rows]
