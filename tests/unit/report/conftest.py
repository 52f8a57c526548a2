"""Fixtures of the report's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.report.runs import RunMaker


@pytest.fixture
def maker(tmp_path: Path) -> RunMaker:
    """A run folder with nothing in it yet."""
    return RunMaker(tmp_path / "run")
