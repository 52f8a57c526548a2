r"""How far a quantized image is from the full-precision image of the same seed.

$$ \text{PSNR} = 10 \log_{10} \frac{255^2}{\text{MSE}} $$
$$ d = \frac{\lVert z_q - z \rVert_2}{\lVert z \rVert_2} $$

with the mean squared error over all pixels and channels of 8-bit levels, and $z$ the final latent.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PEAK = 255.0


def psnr_ceiling(num_values: int) -> float:
    """Return the PSNR in dB of two images of `num_values` levels that differ by one level in one place.

    It is the largest finite value that images of this size can have.
    """
    return 10.0 * math.log10(PEAK**2 * num_values)


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Return the PSNR of each image in dB, as float64 with shape `(N,)`.

    Equal images have no finite PSNR; they count as `psnr_ceiling`, so that a mean over images exists.

    Args:
        images: 8-bit levels with shape `(N, C, H, W)`.
        reference: 8-bit levels of the same shape.
    """
    _check_same_shape(images, reference)
    error = (images.double() - reference.double()).square().flatten(1).mean(dim=1)  # [N]
    return (10.0 * torch.log10(PEAK**2 / error)).clamp(max=psnr_ceiling(images[0].numel()))


def num_identical(images: Tensor, reference: Tensor) -> int:
    """Count the images that equal their reference in every level."""
    _check_same_shape(images, reference)
    return int((images == reference).flatten(1).all(dim=1).sum())


def relative_l2(latents: Tensor, reference: Tensor) -> Tensor:
    """Return the relative L2 distance of each latent to its reference, as float64 with shape `(N,)`.

    Args:
        latents: Shape `(N, ...)`.
        reference: Shape `(N, ...)`, none of them zero throughout.
    """
    _check_same_shape(latents, reference)
    difference = torch.linalg.vector_norm((latents.double() - reference.double()).flatten(1), dim=1)  # [N]
    return difference / torch.linalg.vector_norm(reference.double().flatten(1), dim=1)


def _check_same_shape(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise ValueError(f"Shapes {tuple(first.shape)} and {tuple(second.shape)} differ.")
