"""The estimate of `sample`: one image of two steps, scaled to all images and all of their steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from edadm_cli.artifacts import RunFolder
from edadm_cli.config import BitWidth, SampleConfig
from edadm_cli.estimates import sample as estimates
from edadm_cli.sample.pictures import Picture

CONFIG = SampleConfig(bits=BitWidth.parse("w4a8"), device="cpu")
STEPS, IMAGES, SECONDS = 10, 3, 0.5
HELD_MIB = 4 * 1024 * 1024 / 2**20


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A probe that takes half a second of a clock; it records what is sampled, and says what the process holds."""
    pictures = [Picture(seed, None, STEPS, None, arithmetic="fake-quantize", export="0" * 64) for seed in range(IMAGES)]
    seen: dict[str, Any] = {"sampled": [], "resident": [100.0, 100.0], "clock": 0.0}
    model = SimpleNamespace(pipeline=SimpleNamespace(components={"unet": nn.Linear(1024, 1024, bias=False), "n": 1}))

    def sample_pictures(_: Any, sampled: list[Picture]) -> Any:
        seen["sampled"] += sampled
        seen["clock"] += SECONDS
        return SimpleNamespace(images=torch.zeros(1, 3, 64, 64, dtype=torch.uint8))

    monkeypatch.setattr(estimates, "resolve_task", lambda *_: SimpleNamespace(pictures=pictures))
    monkeypatch.setattr(estimates, "load", lambda *_: model)
    monkeypatch.setattr(estimates, "sample_pictures", sample_pictures)
    monkeypatch.setattr(estimates, "reset_resident_peak", lambda: None)
    monkeypatch.setattr(estimates, "resident_peak_mib", lambda: seen["resident"].pop(0))
    monkeypatch.setattr(estimates.time, "perf_counter", lambda: seen["clock"])
    return seen


def test_two_steps_of_one_image_stand_for_all(probe: dict[str, Any], run_folder: RunFolder) -> None:
    estimate = estimates.estimate(CONFIG, run_folder)
    assert [(picture.seed, picture.num_steps) for picture in probe["sampled"]] == [(0, 2)]
    assert estimate.seconds == SECONDS * STEPS / 2 * IMAGES
    assert estimate.disk_mib == IMAGES * 3 * 64 * 64 / 2**20
    assert estimate.host_memory_mib is None, "on a CPU there is one memory"


def test_memory_is_what_was_added_and_at_least_the_tensors(probe: dict[str, Any], run_folder: RunFolder) -> None:
    assert estimates.estimate(CONFIG, run_folder).memory_mib == HELD_MIB, "memory that was freed before is used again"
    probe["resident"] = [100.0, 350.0]
    assert estimates.estimate(CONFIG, run_folder).memory_mib == 250.0


@pytest.fixture
def run_folder(tmp_path: Any) -> RunFolder:
    return RunFolder(tmp_path / "run")
