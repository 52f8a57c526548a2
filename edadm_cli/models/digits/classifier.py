"""A small digit classifier, whose features every metric of the digits models uses."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from edadm_cli.errors import InputError, UsageError
from edadm_cli.models.digits.data import CLASSIFIER_FILE, TRAIN_COMMAND, WEIGHTS, model_folder

INPUT_SIZE = 32
SPATIAL_CHANNELS = 4
"""The number of channels of the early feature map that `spatial` keeps; few channels keep its covariance small."""


class DigitFeatures(NamedTuple):
    """Holds the outputs of the classifier for `B` images.

    Attributes:
        features: The late features, with shape `(B, 96)`.
        spatial: A part of the early feature map, with shape `(B, 4, 8, 8)`.
        logits: The logits of the ten digits, with shape `(B, 10)`.
    """

    features: Tensor
    spatial: Tensor
    logits: Tensor


def _convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.GroupNorm(out_channels // 8, out_channels),
        nn.ReLU(inplace=True),
    )


class DigitClassifier(nn.Module):
    """Classifies digits, and returns features of two depths.

    `features` are the globally averaged activations before the classification layer. `spatial` is a part of the 8x8
    feature map after the second stage, for a spatial Fréchet distance.
    """

    num_features = 96

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Sequential(
            _convolution(1, 16), _convolution(16, 16), nn.MaxPool2d(2),
            _convolution(16, 32), _convolution(32, 32), nn.MaxPool2d(2),
        )  # fmt: skip
        self.late = nn.Sequential(
            _convolution(32, 64), nn.MaxPool2d(2), _convolution(64, self.num_features)
        )  # fmt: skip
        self.head = nn.Linear(self.num_features, 10)

    def forward(self, images: Tensor) -> DigitFeatures:
        """Returns features and logits of images with shape `(B, 1 or 3, H, W)` and values in [0, 1]."""
        early = self.early(_to_input(images))  # [B, 32, 8, 8]
        features = self.late(early).mean(dim=(2, 3))  # [B, 96]
        return DigitFeatures(features, early[:, :SPATIAL_CHANNELS], self.head(features))


def _to_input(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
        actual = f"{images.dtype} with shape {tuple(images.shape)}"
        raise UsageError(f"Floating-point images with shape (B, 1 or 3, H, W) were expected, got {actual}.")
    gray = images.mean(dim=1, keepdim=True)  # [B, 1, H, W]
    if gray.shape[-2:] == (INPUT_SIZE, INPUT_SIZE):
        return gray
    return functional.interpolate(gray, (INPUT_SIZE, INPUT_SIZE), mode="bilinear", align_corners=False)


def load_classifier(device: str | torch.device = "cpu", root: Path = WEIGHTS) -> DigitClassifier:
    """Loads the trained classifier in float32, ready for evaluation.

    Raises:
        InputError: The weights are missing.
    """
    path = model_folder("classifier", root) / CLASSIFIER_FILE
    if not path.is_file():
        raise InputError(
            f"The classifier's weights were expected in {path}, but the file is missing.", hint=TRAIN_COMMAND
        )
    classifier = DigitClassifier()
    classifier.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return classifier.to(device).eval().requires_grad_(False)
