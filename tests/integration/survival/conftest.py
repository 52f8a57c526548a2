"""A run with its first two artifacts, made once and copied for each test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edadm_cli.cli.app import main
from tests.integration.survival.helpers import OPTIONS


@pytest.fixture(scope="module")
def pristine(tiny_ddpm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a `collect` and a `select` artifact."""
    run = tmp_path_factory.mktemp("pristine") / "run"
    assert main(["collect", "--model", str(tiny_ddpm), *OPTIONS, "--run", str(run), "-q"]) == 0
    assert main(["select", "--run", str(run), "-q"]) == 0
    return run


@pytest.fixture
def run(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that run, and an empty working folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pristine, tmp_path / "run")
    return Path("run")
