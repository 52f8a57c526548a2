"""A quick part of the table of denoisers; `make table` makes all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.denoisers.table import ROWS, measure

# one tensor per image and prompts of different length; guidance in two calls per step
QUICK = ("z_image", "qwen_image")


@pytest.mark.parametrize("name", QUICK)
def test_a_denoiser_goes_through_the_chain(name: str, tmp_path: Path) -> None:
    row = next(row for row in ROWS if row.build.__name__ == name)
    result = measure(row, tmp_path, is_quick=True)
    assert result.refusal is None
    assert result.blocks >= 2
    quantized, layers = result.layers
    assert 0.8 * layers < quantized <= layers
