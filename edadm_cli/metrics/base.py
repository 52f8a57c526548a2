"""The interface of a metric: its name, its direction, its needs, and its computation.

A metric of another package subclasses `Metric` and is named by an entry point of the group `edadm.metrics`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from edadm_cli.metrics.representation import Features, Layer, Statistics

Need = Literal["features", "real_statistics", "real_images", "prompts", "labels"]
"""An input that not every evaluation has: features of a network, statistics of real images, real images, prompts, and
prompts that name a class."""
T = TypeVar("T")
NEIGHBOURS = 3
"""Nearest neighbours that span the manifolds of precision and recall."""
INCEPTION = "inception"
"""Name of the feature space whose metrics have names of their own, such as `fid`."""


@dataclass(frozen=True)
class Value:
    """The result of a metric.

    Attributes:
        value: The metric of the whole set.
        features: The features that it was computed in, such as `digits/pooled` or `pixels`.
        num_images: The number of images.
        per_image: One value per image, for paired metrics; empty for others.
    """

    value: float
    features: str
    num_images: int
    per_image: tuple[float, ...] = ()


class ImageSet(Protocol):
    """Images of one pipeline in a fixed order of seeds."""

    def __len__(self) -> int:
        """Returns the number of images."""

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields batches: 8-bit levels with shape `(n, C, H, W)`, C 1 or 3, and latents with shape `(n, *)`."""


class Context(Protocol):
    """The inputs of a metric; each is computed once and shared by all metrics.

    Attributes:
        images: The images to measure.
        reference: The full-precision images of the same seeds, which paired metrics compare with.
        prompts: One prompt per image; `None` for models without prompts.
        labels: The class that each prompt names, -1 for none, with shape `(N,)`; `None` if there are no classes.
        feature_name: Name of the feature extractor, such as `digits`.
    """

    images: ImageSet
    reference: ImageSet
    prompts: Sequence[str] | None
    labels: Tensor | None
    feature_name: str

    def features(self, images: ImageSet) -> Features:
        """Returns the features of the images or of the reference."""

    def real_features(self) -> Features:
        """Returns the features of the real images."""

    def real_statistics(self, layer: Layer) -> Statistics:
        """Returns mean and covariance of a layer's features over the real images."""

    def once(self, key: str, compute: Callable[[], T]) -> T:
        """Returns the result of a function that several metrics share, computed for the first of them."""


class Metric(ABC):
    """One metric.

    Attributes:
        name: Key of the metric in JSON, and its name in `--metrics`.
        label: Its name for people.
        better: Whether lower or higher values are better.
        description: A short description.
        needs: The inputs that it needs; without one, the metric is left out with the reason.
        paired: Whether it compares each image with the full-precision image of the same seed. Paired metrics are
            reported under `distance_to_full_precision`, others under `metrics` and `full_precision`.
        by_default: Whether it is computed unless other metrics are named.
        percent: Whether it is shown as a percentage.
        unit: Unit of the value; empty if it has none.
        min_images: Smallest number of images that it is defined for.
        layer: Layer of the features, for metrics in features.
        compared: The quantity that a paired metric compares, such as `pixels`.
    """

    name: str
    label: str
    better: Literal["lower", "higher"]
    description: str = ""
    needs: frozenset[Need] = frozenset()
    paired: bool = False
    by_default: bool = True
    percent: bool = False
    unit: str = ""
    min_images: int = 1
    layer: Layer = "pooled"
    compared: str = ""

    def applies(self, space: str) -> bool:
        """Returns whether the metric exists for models measured in a feature space, such as `digits` or `inception`."""
        return True

    def default_in(self, space: str) -> bool:
        """Returns whether the metric is computed by default in this feature space."""
        return self.by_default

    def identity(self, config: Any) -> dict[str, Any]:
        """Returns everything but the images that decides the value, as JSON values; `config` is an `EvaluateConfig`."""
        return {}

    def open(self, config: Any, device: torch.device) -> Any:
        """Loads the metric's own resource, such as a network, which is passed to `compute`.

        Raises:
            InputError: The resource is missing and cannot be downloaded. The metric is left out with this reason.
        """
        return None

    @abstractmethod
    def compute(self, context: Context, resource: Any) -> Value:
        """Computes the metric.

        Args:
            context: The images, and everything that `needs` names.
            resource: The result of `open`.
        """
