r"""Distances between the images of a quantized pipeline and the full-precision images of the same seeds.

$$ \text{PSNR} = 10 \log_{10} \frac{255^2}{\text{MSE}} $$
$$ d = \frac{\lVert z_q - z \rVert_2}{\lVert z \rVert_2} $$

with the mean squared error over all pixels and channels of 8-bit levels, and $z$ the final latent.

$$ \text{SSIM} = \mathbb{E} \frac{(2 \mu_x \mu_y + c_1)(2 \sigma_{xy} + c_2)}
{(\mu_x^2 + \mu_y^2 + c_1)(\sigma_x^2 + \sigma_y^2 + c_2)} $$

over Gaussian windows of 11x11 pixels with a standard deviation of 1.5, with $c_1 = (0.01 \cdot 255)^2$ and
$c_2 = (0.03 \cdot 255)^2$.

References:
    Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity (IEEE TIP 13(4), 2004).
    Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (arXiv 1801.03924), whose
    unit-length features `perceptual_distance` takes, without its learned weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edadm_cli.metrics.representation import Features

PEAK = 255.0
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2


def psnr_ceiling(num_values: int) -> float:
    """Returns the PSNR in dB of two images of `num_values` levels that differ by one level in one place.

    It is the largest finite value that images of this size can have.
    """
    return 10.0 * math.log10(PEAK**2 * num_values)


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Returns the PSNR of each image in dB, as float64 with shape `(N,)`.

    Equal images have no finite PSNR; they count as `psnr_ceiling`, so that a mean over images exists.

    Args:
        images: 8-bit levels with shape `(N, C, H, W)`.
        reference: 8-bit levels of the same shape.
    """
    _check_same_shape(images, reference)
    error = (images.double() - reference.double()).square().flatten(1).mean(dim=1)  # [N]
    return (10.0 * torch.log10(PEAK**2 / error)).clamp(max=psnr_ceiling(images[0].numel()))


def num_identical(images: Tensor, reference: Tensor) -> int:
    """Returns the number of images that equal their reference in every pixel."""
    _check_same_shape(images, reference)
    return int((images == reference).flatten(1).all(dim=1).sum())


def relative_l2(latents: Tensor, reference: Tensor) -> Tensor:
    """Returns the relative L2 distance of each latent to its reference, as float64 with shape `(N,)`.

    Args:
        latents: Latents with shape `(N, ...)`.
        reference: References with shape `(N, ...)`, none of which is zero everywhere.
    """
    _check_same_shape(latents, reference)
    difference = torch.linalg.vector_norm((latents.double() - reference.double()).flatten(1), dim=1)  # [N]
    return difference / torch.linalg.vector_norm(reference.double().flatten(1), dim=1)


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Returns the structural similarity of each image, as float64 with shape `(N,)`; 1 for equal images.

    Images with a side below 11 pixels have a smaller window.

    Args:
        images: 8-bit levels with shape `(N, C, H, W)`.
        reference: 8-bit levels of the same shape.
    """
    _check_same_shape(images, reference)
    x, y = images.double(), reference.double()
    kernel = _gaussian(min(_WINDOW, *x.shape[-2:])).to(x.device)

    def blurred(values: Tensor) -> Tensor:
        channels = values.shape[1]
        rows = kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
        columns = kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
        convolve = torch.nn.functional.conv2d
        return convolve(convolve(values, rows, groups=channels), columns, groups=channels)

    mean_x, mean_y = blurred(x), blurred(y)
    variance_x, variance_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    similarity = ((2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)) / (
        (mean_x**2 + mean_y**2 + _C1) * (variance_x + variance_y + _C2)
    )
    return similarity.flatten(1).mean(dim=1)


def perceptual_distance(features: Features, reference: Features) -> Tensor:
    """Returns the perceptual distance of each image, as float64 with shape `(N,)`; 0 for equal features, at most 4.

    It is the mean over the spatial and the pooled features of the squared distance between unit-length vectors.

    Args:
        features: Features of `N` images.
        reference: Features of their references.
    """
    distances = []
    for layer in ("spatial", "pooled"):
        first, second = (_unit_length(set_.layer(layer)) for set_ in (features, reference))
        distances.append((first - second).square().sum(dim=1))
    return torch.stack(distances).mean(dim=0)


def _unit_length(values: Tensor) -> Tensor:
    flat = values.flatten(1).double().cpu()
    return flat / torch.linalg.vector_norm(flat, dim=1, keepdim=True).clamp(min=1e-12)


def _gaussian(size: int) -> Tensor:
    places = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    weights = torch.exp(-places.square() / (2 * _SIGMA**2))
    return weights / weights.sum()


def _check_same_shape(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise ValueError(f"Shapes {tuple(first.shape)} and {tuple(second.shape)} differ.")
