"""Metrics that compare each image with the full-precision image of the same seed.

The arithmetic is in `edadm_cli.metrics.distances`, and that of features in `perceptual_distance` below.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from edadm_cli.metrics.base import Context, Metric, Need, Value

if TYPE_CHECKING:
    from torch import Tensor


class Paired(Metric):
    """A metric with one value per image, whose mean is reported."""

    paired = True
    compared = "pixels"

    def compute(self, context: Context, resource: Any) -> Value:
        """Computes the value of each image, batch by batch."""
        import torch

        batches = zip(context.images.pairs(), context.reference.pairs(), strict=True)
        values = torch.cat([self.of_batch(*images, *reference) for images, reference in batches])
        return Value(float(values.mean()), self.compared, len(values), tuple(values.tolist()))

    @abstractmethod
    def of_batch(self, images: Tensor, latents: Tensor, reference: Tensor, reference_latents: Tensor) -> Tensor:
        """Returns one value per image, as float64 with shape `(n,)`."""


class Formula(Paired):
    """A paired metric that is one function of `metrics.distances`, of the images or of their final latents."""

    function: ClassVar[str]

    def of_batch(self, images: Tensor, latents: Tensor, reference: Tensor, reference_latents: Tensor) -> Tensor:
        """Returns the values of the function, one per image."""
        from edadm_cli.metrics import distances

        pair = (images, reference) if self.compared == "pixels" else (latents, reference_latents)
        values: Tensor = getattr(distances, self.function)(*pair)
        return values


class Psnr(Formula):
    """The peak signal-to-noise ratio in dB."""

    name, label, unit, function = "psnr_db", "PSNR", "dB", "psnr"
    better = "higher"
    description = "peak signal-to-noise ratio of the pixels"


class LatentRelativeL2(Formula):
    """The relative L2 distance of the final latents."""

    name, label, compared, function = "latent_rel_l2", "Relative L2", "final latent", "relative_l2"
    better = "lower"
    description = "relative L2 distance of the final latents"


class Ssim(Formula):
    """The structural similarity."""

    name, label, function = "ssim", "SSIM", "ssim"
    better = "higher"
    description = "structural similarity of the pixels"


class PerceptualDistance(Metric):
    """The distance of the two images in the features of the network that the other metrics are computed in."""

    name, label = "perceptual_distance", "Perceptual distance"
    better = "lower"
    description = "distance of unit-length features, spatial and pooled"
    needs: frozenset[Need] = frozenset({"features"})
    paired = True
    compared = "features"

    def compute(self, context: Context, resource: Any) -> Value:
        """See `distances.perceptual_distance`."""
        from edadm_cli.metrics.distances import perceptual_distance

        values = perceptual_distance(context.features(context.images), context.features(context.reference))
        name = f"{context.feature_name}/spatial+pooled"
        return Value(float(values.mean()), name, len(values), tuple(values.tolist()))


METRICS: tuple[Metric, ...] = (Psnr(), LatentRelativeL2(), Ssim(), PerceptualDistance())
ALWAYS = frozenset({"psnr_db", "latent_rel_l2"})
"""Paired metrics that are cheap and always computed, whatever `--metrics` names."""
