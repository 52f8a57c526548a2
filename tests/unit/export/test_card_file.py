"""The card in an export's folder follows its evaluation, and the export stays whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from edadm_cli.artifacts import build, open_artifact
from edadm_cli.errors import EdadmError, InputError
from edadm_cli.export.card_file import update_card
from edadm_cli.export.push import prepare
from tests.unit.report.runs import RunMaker, png


@pytest.fixture
def maker(tmp_path: Path) -> RunMaker:
    """A run up to its export."""
    maker = RunMaker(tmp_path / "run")
    maker.facts["evaluation.json"]["grid"] = "images/0-full.png"
    maker.calibration()
    maker.make("reconstruct", "w4a8")
    maker.make("export", "w4a8")
    return maker


def test_a_card_gets_the_metrics_and_the_grid_of_the_evaluation(maker: RunMaker) -> None:
    export = maker.run.path("export", "w4a8")
    manifest = export / "manifest.json"
    before = manifest.read_bytes()
    update_card(maker.run, "w4a8")
    assert manifest.read_bytes() == before  # there is no evaluation yet
    maker.make("evaluate", "w4a8")
    update_card(maker.run, "w4a8")
    card = (export / "README.md").read_text()
    assert "| PSNR to full precision |  | 31.25 |  | 80 |" in card
    assert "(grid.png)" in card
    assert (export / "grid.png").read_bytes() == png(0)
    artifact = open_artifact(export, "export")
    assert {"README.md", "grid.png"} <= {entry.path for entry in artifact.manifest.payload}
    stamp = manifest.stat().st_mtime_ns
    update_card(maker.run, "w4a8")
    assert manifest.stat().st_mtime_ns == stamp
    assert sorted(prepare(export, "a/b").files) == ["export.json", "grid.png", "model_index.json"]


def test_an_evaluation_of_another_export_is_not_in_the_card(maker: RunMaker) -> None:
    maker.make("evaluate", "w4a8")
    maker.facts["plan.json"]["kept"] = {}
    maker.recipe = "another"
    maker.make("reconstruct", "w4a8")
    maker.make("export", "w4a8")
    update_card(maker.run, "w4a8")
    assert not (maker.run.path("export", "w4a8") / "grid.png").exists()


def test_an_update_that_is_killed_leaves_a_whole_export(maker: RunMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    maker.make("evaluate", "w4a8")
    update_card(maker.run, "w4a8")
    export = maker.run.path("export", "w4a8")
    (export / "README.md").unlink()
    with pytest.raises(InputError, match=r"README\.md is missing"):
        update_card(maker.run, "w4a8")  # as every command says of a file that somebody removed
    maker.make("export", "w4a8")
    monkeypatch.setattr(build, "describe_file", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises((EdadmError, OSError)):
        update_card(maker.run, "w4a8")
    monkeypatch.undo()
    assert [entry.path for entry in open_artifact(export, "export").manifest.payload] == [
        "export.json",
        "model_index.json",
    ]
    update_card(maker.run, "w4a8")
    assert "grid.png" in [entry.path for entry in open_artifact(export, "export").manifest.payload]
