"""Tiny pipelines, collected once per session."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edadm_cli.artifacts import RunFolder
from edadm_cli.collect import stage as collect
from tests.integration.collect.helpers import config_of


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of three prompts, with an empty line."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("one\ntwo\n\nthree\n")
    return path


@pytest.fixture(scope="session")
def collected(
    tiny_sd: Path,
    tiny_ddpm: Path,
    tiny_dit: Path,
    tiny_sdxl: Path,
    prompts: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, RunFolder]:
    """A run of each tiny pipeline by its name, shared by all tests: a test copies a run before it changes it."""
    runs = {}
    for folder in (tiny_sd, tiny_ddpm, tiny_dit, tiny_sdxl):
        runs[folder.name] = RunFolder(tmp_path_factory.mktemp("runs") / folder.name)
        assert collect.run(config_of(folder, prompts), runs[folder.name]).status == "done"
    return runs


@pytest.fixture
def sd_run(collected: dict[str, RunFolder], tmp_path: Path) -> RunFolder:
    """A copy of the Stable Diffusion's run."""
    return RunFolder(Path(shutil.copytree(collected["tiny-sd"].root, tmp_path / "run")))
