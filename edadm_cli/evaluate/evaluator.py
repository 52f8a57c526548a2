"""Computes the metrics of sets of images; each set passes through the feature extractor once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, TypeVar

from torch import Tensor

from edadm_cli.errors import InputError, MachineError
from edadm_cli.evaluate.features import FeatureSpace
from edadm_cli.evaluate.images import SampledImages
from edadm_cli.evaluate.real import RealImages
from edadm_cli.metrics.base import Metric, Value
from edadm_cli.metrics.fidelity import feature_statistics
from edadm_cli.metrics.representation import Features, Layer, Statistics
from edadm_cli.plugins import wrong_result

T = TypeVar("T")


class RealFeatures:
    """The real images in a feature space; features are computed when they are first needed.

    Args:
        real: The real images.
        space: The feature extractor.
    """

    def __init__(self, real: RealImages, space: FeatureSpace) -> None:
        self._real = real
        self._space = space
        self._features: dict[tuple[int, int], Features] = {}
        self._statistics: dict[Layer, Statistics] = dict(real.statistics())

    def features(self, size: tuple[int, int]) -> Features:
        """Returns the features of the real images, which are resized to the height and width of the samples.

        Raises:
            InputError: There are only statistics, or a file is not an image.
        """
        if self._real.images is None:
            raise InputError(f"{self._real.name} holds statistics only; the real images themselves were expected.")
        if size not in self._features:
            self._features[size] = self._space.extract(self._real.images(size))
        return self._features[size]

    def num_features(self, layer: Layer) -> int:
        """Returns the number of features of a layer; 0 as long as its statistics are not known."""
        return self._statistics[layer].mean.size if layer in self._statistics else 0

    def statistics(self, layer: Layer, size: tuple[int, int]) -> Statistics:
        """Returns the mean and covariance of a layer's features: stored ones if there are any, else of the images."""
        if layer not in self._statistics:
            self._statistics[layer] = feature_statistics(self.features(size).layer(layer))
        return self._statistics[layer]


@dataclass
class Evaluator:
    """Computes the same metrics for several sets of images.

    Args:
        metrics: The metrics, by name.
        resources: The networks that metrics loaded, by metric.
        feature_name: Name of the features in results, such as `digits`.
        space: The feature extractor; `None` if no metric needs one.
        real: The real images in the features; `None` if no metric needs them.
        prompts: One prompt per image; `None` for models without prompts.
        labels: The class that each prompt names, -1 for none; `None` if no prompt names one.
    """

    metrics: Mapping[str, Metric]
    resources: Mapping[str, Any]
    feature_name: str
    space: FeatureSpace | None
    real: RealFeatures | None
    prompts: Sequence[str] | None
    labels: Tensor | None
    _features: dict[SampledImages, Features] = field(default_factory=dict)

    def values(self, images: SampledImages, reference: SampledImages, paired: bool) -> dict[str, Value]:
        """Returns the paired metrics of a set of images, or the others, by name.

        Args:
            images: The images.
            reference: The full-precision images of the same seeds.
            paired: Whether to compute the metrics that compare the two sets, or those of `images` alone.

        Raises:
            InputError: A value is not finite, or the real statistics belong to other features.
            MachineError: A metric of another package returned no `Value`, or one without the numbers that it needs.
        """
        context = EvaluationContext(self, images, reference)
        values = {
            name: metric.compute(context, self.resources.get(name))
            for name, metric in self.metrics.items()
            if metric.paired == paired
        }
        for name, value in values.items():
            _require_value(name, self.metrics[name], value, len(images))
            if not math.isfinite(value.value):
                raise InputError(f"{name} of {len(images)} images is {value.value}, but a finite number was expected.")
        return values

    def features(self, images: SampledImages) -> Features:
        """Returns the features of a set of images."""
        assert self.space is not None, "a metric in features needs a feature extractor"
        if images not in self._features:
            self._features[images] = self.space.extract(images)
        return self._features[images]

    def cautions(self, num_images: int) -> list[str]:
        """Returns a warning for each metric whose value depends strongly on the number of images."""
        few = {
            name: size
            for name, metric in self.metrics.items()
            if "real_statistics" in metric.needs
            and self.real
            and num_images <= (size := self.real.num_features(metric.layer))
        }
        return [
            f"{name} of {num_images} images in {size} features is far above that of many images; "
            "compare it only with values of as many images."
            for name, size in few.items()
        ]


def _require_value(name: str, metric: Metric, value: object, num_images: int) -> None:
    """Refuses a metric that returned no `Value` of numbers.

    Raises:
        MachineError: It returned something else.
    """

    def wrong(expected: str) -> MachineError:
        return wrong_result(f"The metric '{name}'", metric, value, expected)

    if not isinstance(value, Value):
        raise wrong("a 'Value' of edadm_cli.metrics.base")
    numbers: tuple[object, ...] = (value.value, value.num_images)
    if not all(isinstance(number, Real) for number in numbers):
        raise wrong("a 'Value' with numbers in 'value' and 'num_images'")
    if metric.paired and len(value.per_image) != num_images:
        raise wrong(f"a 'Value' with {num_images} numbers in 'per_image'")


class EvaluationContext:
    """The inputs of a metric; implements `edadm_cli.metrics.base.Context`."""

    def __init__(self, evaluator: Evaluator, images: SampledImages, reference: SampledImages) -> None:
        self._evaluator = evaluator
        self.images: Any = images
        self.reference: Any = reference
        self.prompts, self.labels = evaluator.prompts, evaluator.labels
        self.feature_name = evaluator.feature_name
        height, width = images[0].shape[-2:]
        self._size = (height, width)
        self._shared: dict[str, Any] = {}

    def features(self, images: Any) -> Features:
        """Returns the features of the images or of the reference."""
        return self._evaluator.features(images)

    def real_features(self) -> Features:
        """Returns the features of the real images."""
        return self._real.features(self._size)

    def real_statistics(self, layer: Layer) -> Statistics:
        """Returns the mean and covariance of a layer's features over the real images."""
        return self._real.statistics(layer, self._size)

    def once(self, key: str, compute: Callable[[], T]) -> T:
        """Returns the result of a function that several metrics share, computed once per key."""
        if key not in self._shared:
            self._shared[key] = compute()
        result: T = self._shared[key]
        return result

    @property
    def _real(self) -> RealFeatures:
        assert self._evaluator.real is not None, "the metric needs real images"
        return self._evaluator.real
