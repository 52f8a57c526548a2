"""A classifier with random weights in the place of the shipped one, and random images."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from edadm_cli.models.digits.classifier import DigitClassifier

ImageMaker = Callable[..., Tensor]


@pytest.fixture
def random_classifier(monkeypatch: pytest.MonkeyPatch) -> DigitClassifier:
    """Replace the shipped digit classifier, wherever `evaluate` loads it, by one with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        classifier = DigitClassifier().eval().requires_grad_(False)
    monkeypatch.setattr("edadm_cli.evaluate.features.load_classifier", lambda device="cpu": classifier)
    return classifier


@pytest.fixture(scope="session")
def random_images() -> ImageMaker:
    """Return a function that makes smooth random images, uint8 with shape `(count, channels, size, size)`."""

    def make(seed: int, count: int, size: int = 16, channels: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.rand(count, channels, 4, 4, generator=generator)
        fine = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")
        return (fine * 255).round().to(torch.uint8)

    return make
