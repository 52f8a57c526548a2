"""Figures of quality of a set of images, from one pass of the images through the feature extractor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from edadm_cli.artifacts import Metric
from edadm_cli.errors import InputError
from edadm_cli.evaluate import fidelity
from edadm_cli.evaluate.clip_score import ClipScorer
from edadm_cli.evaluate.features import FeatureSpace
from edadm_cli.evaluate.images import SampledImages, to_rgb
from edadm_cli.evaluate.metrics import MetricSpec
from edadm_cli.evaluate.real import RealImages
from edadm_cli.evaluate.representation import Features, Layer, Statistics


class RealFeatures:
    """The real images in a feature space; nothing is computed before it is asked for.

    Args:
        real: The real images.
        space: The feature extractor.
    """

    def __init__(self, real: RealImages, space: FeatureSpace) -> None:
        self._real = real
        self._space = space
        self._features: dict[tuple[int, int], Features] = {}
        self._statistics: dict[Layer, Statistics] = dict(real.statistics)

    def features(self, size: tuple[int, int]) -> Features:
        """Features of the real images, where they are files: brought to the height and width of the samples.

        Raises:
            InputError: There are statistics only, or a file is no image.
        """
        if self._real.images is None:
            raise InputError(f"{self._real.name} holds statistics only, and the real images themselves were wanted.")
        if size not in self._features:
            self._features[size] = self._space.extract(self._real.images(size))
        return self._features[size]

    def num_features(self, layer: Layer) -> int:
        """Number of features of a layer, once its statistics are known; 0 before."""
        return self._statistics[layer].mean.size if layer in self._statistics else 0

    def statistics(self, layer: Layer, size: tuple[int, int]) -> Statistics:
        """Mean and covariance of a layer's features: ready-made where there are such, else of the images."""
        if layer not in self._statistics:
            self._statistics[layer] = fidelity.feature_statistics(self.features(size).layer(layer))
        return self._statistics[layer]


@dataclass
class Judge:
    """Computes the same figures for several sets of images.

    Args:
        wanted: The figures, by name.
        feature_name: What the features are called in the figures, such as `digits`.
        space: The feature extractor; `None` where no figure needs one.
        clip: The CLIP model; `None` where no figure needs one.
        real: The real images in the features; `None` where no figure needs them.
        labels: Prompted class of each image, -1 for a prompt that names none; `None` where no figure needs
            them.
    """

    wanted: Mapping[str, MetricSpec]
    feature_name: str
    space: FeatureSpace | None
    clip: ClipScorer | None
    real: RealFeatures | None
    labels: Tensor | None

    def figures(self, images: SampledImages) -> dict[str, Metric]:
        """Compute every wanted figure of a set of images.

        Raises:
            InputError: A figure is not finite, or the real statistics belong to other features.
        """
        measured = _Measured(self, images)
        figures = {name: measured.metric(spec) for name, spec in self.wanted.items()}
        for name, metric in figures.items():
            if not math.isfinite(metric.value):
                raise InputError(f"{name} of {len(images)} images came out as {metric.value}, which is no figure.")
        return figures

    def cautions(self, num_images: int) -> list[str]:
        """Say which figures of so few images compare with nothing but figures of as many."""
        few = {
            name: size
            for name, spec in self.wanted.items()
            if spec.quantity == "frechet" and self.real and num_images <= (size := self.real.num_features(spec.layer))
        }
        return [
            f"{name} of {num_images} images in {size} features is far above that of many images; "
            "compare it with figures of as many images only."
            for name, size in few.items()
        ]


class _Measured:
    """One set of images, and what several figures share."""

    def __init__(self, judge: Judge, images: SampledImages) -> None:
        self.judge = judge
        self.images = images
        height, width = images[0].shape[-2:]
        self.size = (height, width)

    def metric(self, spec: MetricSpec) -> Metric:
        if spec.quantity == "clip_score":
            return self._clip_score()
        count = len(self.images)
        value: float
        if spec.quantity == "frechet":
            value = self._frechet(spec.layer)
        elif spec.quantity == "kernel":
            value = fidelity.kernel_distance(self.features.pooled, self._real.features(self.size).pooled)
        elif spec.quantity == "score":
            value = fidelity.inception_score(self.features.logits)
        elif spec.quantity == "prompt_accuracy":
            value, count = self._prompt_accuracy()
        else:
            value = self.precision_recall[0 if spec.quantity == "precision" else 1]
        return Metric(value=value, features=f"{self.judge.feature_name}/{spec.layer}", num_images=count)

    @cached_property
    def features(self) -> Features:
        assert self.judge.space is not None, "a figure in features was wanted without a feature extractor"
        return self.judge.space.extract(self.images)

    @property
    def _real(self) -> RealFeatures:
        assert self.judge.real is not None, "a distance was wanted without real images"
        return self.judge.real

    @cached_property
    def precision_recall(self) -> tuple[float, float]:
        return fidelity.precision_recall(self.features.pooled, self._real.features(self.size).pooled)

    def _frechet(self, layer: Layer) -> float:
        found = fidelity.feature_statistics(self.features.layer(layer))
        real = self._real.statistics(layer, self.size)
        if found.mean.shape != real.mean.shape:
            raise InputError(
                f"The statistics of the real images are of {real.mean.size} features, while "
                f"{self.judge.feature_name} has {found.mean.size}: they belong to another feature extractor."
            )
        return fidelity.frechet_distance(found, real)

    def _prompt_accuracy(self) -> tuple[float, int]:
        assert self.judge.labels is not None, "prompt accuracy was wanted without labels"
        named = self.judge.labels >= 0
        value = fidelity.prompt_accuracy(self.features.logits[named], self.judge.labels[named])
        return value, int(named.sum())

    def _clip_score(self) -> Metric:
        clip, prompts = self.judge.clip, self.images.plan.prompts
        assert clip is not None, "a CLIP score was wanted without a CLIP model"
        assert prompts is not None, "a CLIP score was wanted without prompts"
        scores = [
            clip.score(torch.stack([to_rgb(image) for image in batch.images]), prompts[places])
            for places, batch in self.images.batches()
        ]
        value = float(torch.cat(scores).mean())
        return Metric(value=value, features=f"clip/{clip.name}", num_images=len(self.images))
