"""Models that are evaluated in Inception features, from weights in a file or without any."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edadm_cli.artifacts import Artifact, RunFolder
from edadm_cli.collect import stage as collect_stage
from edadm_cli.config import BitWidth, CollectConfig, EvaluateConfig
from edadm_cli.errors import InputError
from edadm_cli.evaluate import stage
from edadm_cli.progress import SilentReporter

Exporter = Callable[[RunFolder, float], Artifact]


@pytest.fixture
def folder_run(tmp_path: Path, tiny_sd: Path, export_noisy: Exporter) -> RunFolder:
    """A run of a user's diffusers folder, which no registry knows."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n", encoding="utf-8")
    run = RunFolder(tmp_path / "run")
    collect_stage.run(
        CollectConfig(model=str(tiny_sd), num_trajectories=2, num_steps=2, batch_size=2, prompts=prompts), run
    )
    export_noisy(run, 0.05)
    return run


def _config(**fields: Any) -> EvaluateConfig:
    bits = BitWidth(weight=4, activation=8)
    return EvaluateConfig(**{"bits": bits, "num_images": 6, "batch_size": 4, "device": "cpu", **fields})


def test_without_weights_distances_remain_and_every_missing_metric_says_why(
    folder_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", _unreachable)
    reporter = SilentReporter()
    record = stage.run(_config(), folder_run, reporter=reporter)
    assert record.metrics == {}
    assert record.distance_to_full_precision.latent_rel_l2 > 0
    skipped = folder_run.open("evaluate", "w4a8").json("evaluation.json")["skipped"]
    assert set(skipped) == {
        "fid",
        "sfid",
        "kid",
        "inception_score",
        "precision",
        "recall",
        "clip_score",
        "perceptual_distance",
    }
    assert "real images" in skipped["fid"]
    assert "HF_HUB_OFFLINE" in skipped["inception_score"]
    assert "cannot be downloaded" in skipped["clip_score"]
    assert len(record.warnings) == 3
    again = stage.run(_config(), folder_run)
    assert again.status == "up_to_date"
    assert again.warnings == record.warnings
    with pytest.raises(InputError, match="inception_score cannot be computed"):
        stage.run(_config(metrics=("inception_score",)), folder_run, force=True)
    with pytest.raises(InputError, match=r"dataset cifar10-train was expected in .*HF_HUB_OFFLINE forbids a download"):
        stage.run(_config(real="cifar10-train"), folder_run, force=True)


def test_metrics_in_inception_features_from_a_file_of_weights(
    folder_run: RunFolder, tmp_path: Path, inception_file: Path
) -> None:
    weights = shutil.copy(inception_file, tmp_path)
    real = tmp_path / "real"
    real.mkdir()
    generator = np.random.default_rng(0)
    for index in range(8):
        Image.fromarray(generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(real / f"{index}.png")
    names = ("kid", "inception_score", "precision", "recall")
    config = _config(inception_weights=weights, real=str(real), metrics=names)
    record = stage.run(config, folder_run)
    assert set(record.metrics) == set(names)
    assert record.metrics["kid"].features == "inception-v3/pooled"
    assert record.metrics["inception_score"].features == "inception-v3/logits"
    assert np.isfinite([metric.value for metric in record.metrics.values()]).all()
    Path(weights).write_bytes(b"changed")
    with pytest.raises(InputError, match="other settings"):
        stage.run(config, folder_run)
    with pytest.raises(InputError, match="tensors only"):
        stage.run(config, folder_run, force=True)


def test_statistics_of_other_features_are_refused(folder_run: RunFolder, tmp_path: Path, inception_file: Path) -> None:
    np.savez(tmp_path / "real.npz", mu=np.zeros(96), sigma=np.eye(96))
    config = _config(inception_weights=inception_file, real=str(tmp_path / "real.npz"), metrics=("fid",))
    with pytest.raises(InputError, match="another feature extractor"):
        stage.run(config, folder_run)


def _unreachable(*args: object, **kwargs: object) -> None:
    raise OSError("no network")
