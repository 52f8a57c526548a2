"""`report.html` from artifacts that the stages really wrote, by `edadm run` and by `edadm report`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edadm_cli.cli.app import main
from edadm_cli.report.formats import number
from tests.integration.small_runs import run_config
from tests.unit.report.parsing import parse

CONFIG = run_config(num_trajectories=4)
RECIPE = """
extends = "default"
[learn]
iterations = 3
batch_size = 4
"""
PROMPTS = '<script>alert("a")</script>\na dog & a cat\n'


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a configuration, a recipe and hostile prompts."""
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "edadm.toml").write_text(CONFIG.replace("recipe.toml", str(tmp_path / "recipe.toml")))
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_whole_chain_ends_in_a_page(place: Path, few_blocks_sd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(few_blocks_sd), "--prompts", "prompts.txt", "--config", "edadm.toml", "--run", "run"]
    assert main(["run", *words, "--bits", "w8a8,w4a8", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    text = Path(result["report"]).read_text(encoding="utf-8")
    page = parse(text)
    assert "<script" not in text
    assert page.all("h1")[0].text.endswith("W8A8, W4A8")
    assert page.all("p", class_="missing") == []
    captions = [caption.text for caption in page.all("div", class_="wall")[0].all("figcaption")]
    assert captions == [*PROMPTS.splitlines(), *PROMPTS.splitlines()]
    for bits, stages in result["results"].items():
        ratio = number(stages["export"]["size_mib"]["ratio"], 3)
        assert any(ratio in cell.text for cell in page.all("td")), bits
        for stage in stages.values():
            assert stage["identity"] in text
    assert main(["report", "--run", "run", "--bits", "w8a8,w4a8", "--quiet"]) == 0
    assert Path(capsys.readouterr().out.strip()).read_text(encoding="utf-8") == text
    assert main(["run", *words, "--bits", "w8a8,w4a8", "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["status"] == "up_to_date"
    for bits, stages in result["results"].items():
        for name, stage in stages.items():
            assert planned["results"][bits][name]["identity"] == stage["identity"], f"{bits} {name}"


def test_a_run_that_has_only_begun_has_a_page_too(
    place: Path, tiny_ddpm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "--run", "run"]) == 3
    assert "edadm collect" in capsys.readouterr().err
    assert main(["collect", "--model", str(tiny_ddpm), "--config", "edadm.toml", "--run", "run"]) == 0
    assert main(["select", "--run", "run"]) == 0
    capsys.readouterr()
    assert main(["report", "--run", "run", "--quiet"]) == 0
    page = parse(Path(capsys.readouterr().out.strip()).read_text(encoding="utf-8"))
    commands = [notice.all("code")[0].text for notice in page.all("p", class_="missing")]
    assert commands == [f"edadm {stage} --bits w4a8" for stage in ("reconstruct", "export", "evaluate")]
    assert len(page.all("rect", class_="counts")) == 3
