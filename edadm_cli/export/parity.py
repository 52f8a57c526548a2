"""Compares an export with the reconstruction that it was made from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from edadm_cli.engines.parity import relative_l2
from edadm_cli.engines.reference import LAYER_BOUND
from edadm_cli.errors import EdadmError
from edadm_cli.models.pipeline_calls.sampling import Samples

ROUNDING = 1e-5
"""Bound of the difference between final latents, relative to the largest latent. The order in which a product of one
row is summed may depend on where the weights lie in memory. Where latents differ within this bound, a pixel may round
to the next of its 256 values; where they are equal, images have to be equal."""


@dataclass(frozen=True)
class ExportParity:
    """The result of the comparison.

    Attributes:
        latent_max_abs: Largest absolute difference of final latents in the same arithmetic, before and after packing.
        images_bit_equal: Whether all images have the same bytes, which they always have where latents are equal.
        integer_rel_l2: Largest relative L2 error of a layer's integer arithmetic against quantize-dequantize.
        integer_layer: The layer with that error.
        integer_latent_rel_l2: Relative L2 distance of the final latents of the two arithmetics; `None` when the integer
            arithmetic was not sampled.
    """

    latent_max_abs: float
    images_bit_equal: bool
    integer_rel_l2: float
    integer_layer: str
    integer_latent_rel_l2: float | None


def compare(before: Samples, after: Samples, integer: Samples | None, layer_errors: dict[str, float]) -> ExportParity:
    """Computes the metrics of the comparison and checks them.

    Args:
        before: Samples of the reconstruction.
        after: Samples of the export in the same arithmetic.
        integer: Samples of the export in exact integers; `None` when that would take too long.
        layer_errors: Relative L2 error of each layer's integer arithmetic.

    Raises:
        EdadmError: The export computes other images than the reconstruction, or the error of a layer's integer
            arithmetic exceeds its bound.
    """
    worst = max(layer_errors, key=lambda name: (math.isnan(layer_errors[name]), layer_errors[name]))
    parity = ExportParity(
        latent_max_abs=float((before.latents - after.latents).abs().max()),
        images_bit_equal=torch.equal(before.images, after.images),
        integer_rel_l2=layer_errors[worst],
        integer_layer=worst,
        integer_latent_rel_l2=None if integer is None else relative_l2(integer.latents, after.latents),
    )
    rounding = ROUNDING * float(before.latents.abs().max())
    pixels = int((before.images.int() - after.images.int()).abs().max())
    allowed = 1 if parity.latent_max_abs > 0 else 0
    if not parity.latent_max_abs <= rounding or pixels > allowed:  # NaN is not a rounding error
        raise EdadmError(
            f"The export does not compute what was reconstructed: final latents differ by {parity.latent_max_abs:.3g},"
            f" pixels by {pixels} of 255."
        )
    if not parity.integer_rel_l2 <= LAYER_BOUND:
        raise EdadmError(
            f"Integer arithmetic of '{worst}' differs by {parity.integer_rel_l2:.2e}, the bound is {LAYER_BOUND:.0e}."
        )
    return parity
