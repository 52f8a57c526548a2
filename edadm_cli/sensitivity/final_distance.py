r"""Measures the distance of final samples when one layer alone is quantized.

Errors of single steps do not say how they add up over the steps (docs/results-digits.md, Mixed bits). So the sampler
itself runs with a layer quantized at one width, and the errors of this layer at all widths are scaled by

    measured distance at this width / predicted error at this width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from edadm_cli.metrics.distances import relative_l2

REFERENCE_BITS = 4
_SMALLEST = 1e-9  # of a distance, so that a layer without any effect has a logarithm


class FinalDistance:
    """The distance of final samples to those of full precision.

    Args:
        generate: Samples the same images every time; returns the final latents, with shape `(N, *)`. The denoiser is at
            full precision when this object is created, and may be changed afterwards.
    """

    def __init__(self, generate: Callable[[], Tensor]) -> None:
        self.generate = generate
        self.exact = generate()

    def measure(self) -> float:
        """Returns the squared relative L2 distance, as a geometric mean over the images.

        Single images become other images, and would decide an arithmetic mean.
        """
        distances = relative_l2(self.generate(), self.exact).double().clamp_min(_SMALLEST)
        return float(distances.log().mean().mul(2).exp())


def reference_width(widths: Mapping[int, object]) -> int:
    """Returns the measured number of bits at which final samples are compared: the closest to four."""
    return min(widths, key=lambda bits: (abs(bits - REFERENCE_BITS), bits))


def scaled(errors: Mapping[int, float], factor: float) -> dict[int, float]:
    """Returns the errors of a layer at each width times the ratio of the measured to the predicted distance."""
    return {bits: error * factor for bits, error in errors.items()}
