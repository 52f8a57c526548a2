"""A quick part of the table of denoisers; `make table` makes all of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.denoisers.classes import VERDICTS, denoiser_classes
from tests.denoisers.table import DOCS, ROWS, measure

# one tensor per image and prompts of different length; guidance in two calls per step; two denoisers
QUICK = ("z_image", "qwen_image", "wan22")


@pytest.mark.parametrize("name", QUICK)
def test_a_denoiser_goes_through_the_chain(name: str, tmp_path: Path) -> None:
    row = next(row for row in ROWS if row.build.__name__ == name)
    result = measure(row, tmp_path, is_quick=True)
    assert result.refusal is None
    assert result.blocks >= 2
    quantized, layers = result.layers
    assert 0.8 * layers < quantized <= layers


def test_every_denoiser_class_of_diffusers_has_a_line() -> None:
    table = DOCS.read_text(encoding="utf-8")
    lines = {line.split("`")[1] for line in table.splitlines() if line.startswith("| `")}
    missing = denoiser_classes() - lines
    assert not missing, f"write a verdict in tests/denoisers/classes.py, or a row, for {', '.join(sorted(missing))}"
    assert not VERDICTS.keys() - denoiser_classes()


def test_guidance_that_a_pipeline_ignores_ends_a_collection_with_its_own_reason(tmp_path: Path) -> None:
    row = next(row for row in ROWS if row.build.__name__ == "flux2_klein")
    result = measure(replace(row, guidance=4.0), tmp_path, is_quick=True)
    assert "sampled without guidance, though its scale is 4" in (result.refusal or "")
    assert "is ignored" in (result.refusal or "")
