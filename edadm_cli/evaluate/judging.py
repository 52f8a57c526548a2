"""From a request to a judge: which figures can be had here, and the networks and real images they need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edadm_cli.artifacts import file_sha256
from edadm_cli.errors import InputError
from edadm_cli.evaluate.clip_score import ClipScorer, load_clip
from edadm_cli.evaluate.features import (
    FeatureSpace,
    check_inception_weights,
    digits_digest,
    digits_space,
    inception_space,
)
from edadm_cli.evaluate.metrics import METRICS, MetricChoice
from edadm_cli.evaluate.quality import Judge, RealFeatures
from edadm_cli.evaluate.real import RealImages, open_real, shipped_digits
from edadm_cli.evaluate.request import Request
from edadm_cli.models.digits.data import label_of_prompt

FEATURE_NAMES = {"digits": "digits", "inception": "inception-v3"}
INCEPTION_VERSION = "2015-12-05-6726825d"
"""Date and hash of the Inception weights that torch-fidelity downloads."""


class Judging:
    """The figures of one evaluation, before anything is sampled or loaded onto a device.

    Args:
        request: What is evaluated.

    Raises:
        UsageError: A figure was asked for that this model does not have.
        InputError: A figure was asked for by name and lacks something, or the real images are not usable.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.space_name = request.entry.features
        if request.config.inception_weights is not None:
            check_inception_weights(request.config.inception_weights)
        self.choice = MetricChoice(METRICS[self.space_name], request.config.metrics)
        self.real = self._open_real()
        self.labels = self._labels(request.sampling.prompts)
        if request.sampling.prompts is None:
            self.choice.forget_prompted()
        elif self.labels is None:
            self.choice.drop(self.choice.names("prompt_accuracy"), "no prompt names one digit.")
        real = self.real
        self.choice.drop_without_real(real.statistics if real else (), has_images=bool(real and real.images))
        self.choice.drop_too_few(len(request.sampling))

    def identity_fields(self) -> dict[str, Any]:
        """What decides the figures, beside the images, as plain JSON values."""
        config = self.request.config
        if self.space_name == "digits":
            features = digits_digest()
        elif config.inception_weights is None:
            features = INCEPTION_VERSION
        else:
            features = file_sha256(config.inception_weights)
        clip_file = Path(config.clip_pretrained)
        return {
            "real": None if self.real is None else self.real.digest,
            "features": features,
            "clip_pretrained": file_sha256(clip_file) if clip_file.is_file() else config.clip_pretrained,
        }

    def load(self, device: torch.device) -> Judge:
        """Load the networks, and fetch the real images; figures whose network cannot be had are left out.

        Raises:
            InputError: One of them was asked for by name, or the real images cannot be had.
        """
        if self.real is not None:
            self.real.fetch()
        space = self._load_space(device)
        clip = self._load_clip(device)
        return Judge(
            wanted=dict(self.choice.wanted),
            feature_name=FEATURE_NAMES[self.space_name],
            space=space,
            clip=clip,
            real=RealFeatures(self.real, space) if self.real and space else None,
            labels=self.labels,
        )

    def _open_real(self) -> RealImages | None:
        if not any(spec.needs_real for spec in self.choice.wanted.values()):
            return None
        if self.request.config.real is not None:
            return open_real(self.request.config.real)
        entry = self.request.entry
        return shipped_digits(entry.image_size or 32) if entry.features == "digits" else None

    def _labels(self, prompts: Sequence[str] | None) -> Tensor | None:
        if prompts is None or self.space_name != "digits":
            return None
        labels = [label_of_prompt(prompt) for prompt in prompts]
        if all(label is None for label in labels):
            return None
        return torch.tensor([-1 if label is None else label for label in labels])

    def _load_space(self, device: torch.device) -> FeatureSpace | None:
        names = self.choice.in_features()
        if not names:
            return None
        if self.space_name == "digits":
            return digits_space(device)
        try:
            return inception_space(self.request.config.inception_weights, device)
        except InputError as error:
            if self.request.config.inception_weights is not None:
                raise
            self.choice.drop(names, _reason(error))
            return None

    def _load_clip(self, device: torch.device) -> ClipScorer | None:
        names = self.choice.names("clip_score")
        if not names:
            return None
        try:
            return load_clip(self.request.config.clip_model, self.request.config.clip_pretrained, device)
        except InputError as error:
            self.choice.drop(names, _reason(error))
            return None


def _reason(error: InputError) -> str:
    return error.message if error.hint is None else f"{error.message.removesuffix('.')} ({error.hint})."
