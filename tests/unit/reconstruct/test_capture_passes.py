"""The program that counts passes through the denoiser: only shapes are computed."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from tests.denoisers.families import FAMILIES


def test_passes_are_counted_without_values(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
    program = importlib.import_module("capture_passes")
    with torch.device("meta"):
        denoiser = FAMILIES["unet"]().eval().requires_grad_(False)
    monkeypatch.setattr(program, "build", lambda _: denoiser)
    monkeypatch.setattr("sys.argv", ["capture_passes.py", "--samples", "8", "--budgets", "0", "1"])
    program.main()
    lines = capsys.readouterr().out.splitlines()
    units = int(lines[0].split()[0])
    few, many = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[5:7])
    assert few[1] == few[2] == str(units), "without memory, each unit needs a pass in full precision"
    assert many[1] == "1"
    assert float(many[3]) < float(few[3]) < int(few[4]) == 2 * units
