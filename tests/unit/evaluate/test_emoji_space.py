"""The feature space of the emoji models."""

from __future__ import annotations

import torch

from edadm_cli.config import EvaluateConfig
from edadm_cli.evaluate.real_files import ArrayImages
from edadm_cli.evaluate.spaces import space_of
from edadm_cli.metrics.registry import metrics_of
from edadm_cli.models.emoji import data
from edadm_cli.models.registry import known_models


def test_emoji_are_judged_in_features_of_their_own() -> None:
    entry = known_models()["emoji-sd"]
    space = space_of(entry)
    config = EvaluateConfig.model_construct(inception_weights=None)
    pictures = data.real_pictures()[:6]
    features = space.open(config, torch.device("cpu")).extract(ArrayImages(pictures))
    assert features.pooled.shape == (6, 160)
    assert features.spatial.shape == (6, 256)
    assert features.logits.shape == (6, 500)
    real = space.real_images(entry)
    assert real is not None
    assert real.statistics()["pooled"].mean.shape == (160,)
    assert space.label_of("pear, flat style") == data.names()["retrieval"].index("pear")
    assert {"frechet_distance", "prompt_accuracy", "prompt_among_five"} <= set(metrics_of("emoji"))
    assert "prompt_among_five" not in metrics_of("digits")
    assert "fid" not in metrics_of("emoji")
