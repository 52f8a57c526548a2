"""Runs and exports of the tiny pipelines, made once per session."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edadm_cli.artifacts import RunFolder
from edadm_cli.config import CollectConfig, SelectConfig
from tests.integration.small_runs import CPU, export


@pytest.fixture(scope="session")
def exported_sd(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the tiny Stable Diffusion at W4A8; all tests of a session share it, so none may change it."""
    return _exported(tiny_sd, tmp_path_factory)


@pytest.fixture(scope="session")
def _exported_few_blocks(few_blocks_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _exported(few_blocks_sd, tmp_path_factory)


def _exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    from edadm_cli.models.loading import load_model

    return export(load_model(str(model), CPU, torch.float32), tmp_path_factory.mktemp("export") / "pipeline")


@pytest.fixture
def pipeline(exported_sd: Path) -> Any:
    """The pipeline of `exported_sd`, loaded by diffusers."""
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(exported_sd)


@pytest.fixture
def few_blocks(_exported_few_blocks: Path) -> Any:
    """An exported pipeline like `pipeline` with a quarter of its blocks, for tests that compile its denoiser."""
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(_exported_few_blocks)


@pytest.fixture(scope="session")
def selected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """`selected(model)`: a run folder with four trajectories of three steps, selected from; not to be changed."""
    from edadm_cli.collect import stage as collect
    from edadm_cli.select import stage as select

    made: dict[Path, Path] = {}
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("one\ntwo\nthree\n")

    def make(model: Path) -> Path:
        if model not in made:
            run = RunFolder(tmp_path_factory.mktemp("runs") / model.name)
            config = CollectConfig(
                model=str(model),
                prompts=prompts if "-sd" in model.name else None,
                num_trajectories=4,
                num_steps=3,
                batch_size=2,
                device="cpu",
            )
            collect.run(config, run)
            select.run(SelectConfig(device="cpu"), run)
            made[model] = run.root
        return made[model]

    return make


@pytest.fixture
def fresh_run(selected: Callable[[Path], Path], tmp_path: Path) -> Callable[[Path], RunFolder]:
    """`fresh_run(model)`: a separate copy of `selected(model)`."""

    def make(model: Path) -> RunFolder:
        place = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(selected(model), place)
        return RunFolder(place)

    return make
