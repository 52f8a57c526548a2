"""A stage that is up to date answers at once: it compares hashes, and imports no library that computes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edadm_cli.artifacts import RunFolder
from edadm_cli.cli.app import main
from edadm_cli.collect import stage
from edadm_cli.collect.task import recalled
from edadm_cli.config import CollectConfig
from edadm_cli.models.registry import known_models
from edadm_cli.models.shipped import shipped_folder
from edadm_cli.models.sources.file_sets import likely_fingerprint
from edadm_cli.models.sources.folder import read_folder
from edadm_cli.processes import ALONE

PROBE = """
import contextlib, io, json, sys
from edadm_cli.cli.app import main
with contextlib.redirect_stdout(io.StringIO()) as text:
    code = main(json.loads(sys.argv[1]))
heavy = {"torch", "numpy", "diffusers", "transformers", "PIL", "matplotlib"}
print(json.dumps([code, json.loads(text.getvalue())["status"], sorted(heavy & set(sys.modules))]))
"""


SIZE = ["--num-trajectories", "4", "--num-steps", "3", "--batch-size", "4"]
IMAGES = ["--num-images", "2", "--bits", "w4a8"]
EVALUATION = [*IMAGES, "--metrics", "psnr_db"]


@pytest.fixture(scope="module")
def run_folder(tiny_ddpm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("up-to-date") / "run"
    common = ["--run", str(folder), "--quiet"]
    assert main(["collect", "--model", str(tiny_ddpm), *SIZE, *common]) == 0
    assert main(["select", "--strategy", "uniform", *common]) == 0
    assert main(["reconstruct", "--bits", "w4a8", "--recipe", "rtn", *common]) == 0
    assert main(["export", "--parity-samples", "1", *common]) == 0
    assert main(["sample", *IMAGES, *common]) == 0
    assert main(["evaluate", *EVALUATION, *common]) == 0
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ["collect", "--model", "MODEL", *SIZE],
        ["select", "--strategy", "uniform"],
        ["reconstruct", "--bits", "w4a8", "--recipe", "rtn"],
        ["export", "--parity-samples", "1"],
        ["evaluate", *EVALUATION],
    ],
)
def test_nothing_that_computes_is_imported_for_a_stage_that_is_up_to_date(
    run_folder: Path, tiny_ddpm: Path, words: list[str]
) -> None:
    words = [str(tiny_ddpm) if word == "MODEL" else word for word in words]
    assert _imported(*words, "--run", str(run_folder)) == []


@pytest.mark.parametrize("model", ["digits-ddpm", "digits-sd", "ddpm-cifar10-random"])
def test_a_known_model_is_recognized_without_its_pipeline(model: str, tmp_path: Path) -> None:
    words = ["--model", model, "--num-trajectories", "1", "--num-steps", "1", "--run", str(tmp_path)]
    assert main(["collect", *words, "--quiet"]) == 0
    assert _imported("collect", *words) == []


def test_images_that_are_there_are_recognized_without_the_export(run_folder: Path) -> None:
    """Pillow reads the settings of each image from its file."""
    assert set(_imported("sample", *IMAGES, "--run", str(run_folder))) <= {"PIL"}


def test_the_page_of_a_run_is_written_without_anything_that_computes(run_folder: Path) -> None:
    words = ["report", "--run", str(run_folder), "--json"]
    done = subprocess.run([sys.executable, "-c", PROBE, json.dumps(words)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [0, "done", []]


def _imported(*words: str) -> list[str]:
    """Returns the libraries that an up-to-date stage imports."""
    arguments = [sys.executable, "-c", PROBE, json.dumps([*words, "--json"])]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    code, status, imported = json.loads(done.stdout)
    assert (code, status) == (0, "up_to_date")
    return list(imported)


def test_what_is_recalled_is_what_the_pipeline_says(run_folder: Path, tiny_ddpm: Path) -> None:
    config = CollectConfig(model=str(tiny_ddpm), num_trajectories=4, num_steps=3, batch_size=4)
    choices = recalled(config, RunFolder(run_folder))
    assert choices is not None
    spec = stage.prepare(config, ALONE).build_spec()
    assert choices.build_spec() == spec
    assert spec.identity == RunFolder(run_folder).open("collect").identity


@pytest.mark.parametrize(
    "change",
    [
        {"num_steps": 2},
        {"seed": 1},
        {"dtype": "bfloat16"},
        {"prediction_type": "sample"},
        {"guidance_scale": 2.0},
        {"height": 8, "width": 8},
        {"prompts": Path(__file__)},
        {"images": Path(__file__).parent},
        {"model": "digits-ddpm"},
    ],
)
def test_other_settings_are_left_to_the_pipeline(run_folder: Path, tiny_ddpm: Path, change: dict[str, Any]) -> None:
    settings = {"model": str(tiny_ddpm), "num_trajectories": 4, "num_steps": 3, "batch_size": 4, **change}
    assert recalled(CollectConfig(**settings), RunFolder(run_folder)) is None


def test_a_model_whose_files_have_changed_is_not_recognized(tiny_ddpm: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_ddpm, tmp_path / "model"))
    known = likely_fingerprint(model)
    assert known == read_folder(model).fingerprint()
    with (model / "unet/config.json").open("a") as file:
        file.write("\n")
    assert likely_fingerprint(model) != known
    (model / "unet/code.py").touch()
    assert likely_fingerprint(model) is None


def test_the_fingerprint_of_shipped_models_is_found_without_their_classes() -> None:
    for name in ("digits-ddpm", "digits-sd", "emoji-sd", "emoji-dit"):
        folder = shipped_folder(known_models()[name].location).resolve()
        assert likely_fingerprint(folder) == read_folder(folder).fingerprint()
