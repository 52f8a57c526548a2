r"""Where the grid of a tensor lies: min-max, or the range that minimises an L_p error.

    weights:      scale_c = argmin over thresholds t of sum |w_c - w_hat_c(t)|^p, one scale per output channel; or of
                  sum_k E[x_k^2] (w_ck - w_hat_ck(t))^2, the error of the outputs
    activations:  symmetric, or one-sided where all values have one sign: the same over one threshold per tensor
    asymmetric:   argmin over (width, zero-point) pairs

Activation errors are taken over a histogram of the tensor, so their cost does not depend on its size.

References:
    EDA-DM, arXiv 2401.04585, section 4.1 (p = 2.4, 100 candidates).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edadm_cli.quant.grid import Grid
from edadm_cli.recipe import RangeRecipe

_NUM_BINS = 1024
_NUM_ZERO_POINTS = 17
_TINY = 1e-8


@dataclass(frozen=True)
class Range:
    """The values a grid covers: `low <= 0 <= high`."""

    low: float
    high: float

    def merge(self, other: Range, decay: float) -> Range:
        """Returns the exponential moving average over calibration batches."""
        return Range(
            decay * self.low + (1 - decay) * other.low,
            decay * self.high + (1 - decay) * other.high,
        )

    def parameters(self, grid: Grid) -> tuple[float, int]:
        """Returns scale and zero-point of an unsigned grid that covers the range, zero exactly representable."""
        steps = grid.quant_max - grid.quant_min
        scale = max((self.high - self.low) / steps, _TINY)
        zero_point = round(grid.quant_min - self.low / scale)
        return scale, int(min(max(zero_point, grid.quant_min), grid.quant_max))


def input_energy(energy: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """Returns E[x^2] of what each weight meets, in the shape of `weight` `(C_out, C_in / groups, ...)`, from E[x_c^2].

    It is the diagonal of the Hessian of |W x - W_hat x|^2 in the weights of an output channel, where the taps of a
    convolution share the energy of their channel.

    Args:
        energy: E[x_c^2] with shape `(C_in,)`.
        weight: The weight.
        groups: The groups of a convolution, each of which has input channels of its own.
    """
    by_group = energy.to(weight.device, torch.float32).reshape(groups, 1, -1)  # [groups, 1, C_in / groups]
    rows = by_group.expand(groups, weight.shape[0] // groups, -1).flatten(0, 1)  # [C_out, C_in / groups]
    return rows.reshape(*rows.shape, *[1] * (weight.dim() - 2)).expand_as(weight)


def weight_scales(weight: Tensor, grid: Grid, recipe: RangeRecipe, energy: Tensor | None = None) -> Tensor:
    """Returns one scale per output channel, with shape `(C_out,)`, float32, for a weight with shape `(C_out, ...)`.

    With `energy` the error of the outputs is minimised, sum_k E[x_k^2] (w_k - w_hat_k)^2, else that of the weights,
    sum_k |w_k - w_hat_k|^norm.

    Args:
        weight: The weight.
        grid: Its codes.
        recipe: How ranges are found.
        energy: E[x^2] of what each weight meets, in the shape of `weight`; see `input_energy`.
    """
    rows = weight.detach().float().reshape(weight.shape[0], -1)
    largest = rows.abs().amax(dim=1).clamp_min(_TINY)
    full = largest / grid.quant_max
    if recipe.weight == "minmax":
        return full
    importance = None if energy is None else energy.reshape(rows.shape)
    best_scale, best_error = full, torch.full_like(full, torch.inf)
    for candidate in range(1, recipe.num_candidates + 1):
        scale = full * (candidate / recipe.num_candidates)
        codes = (rows / scale[:, None]).round_().clamp_(grid.quant_min, grid.quant_max)
        difference = codes.mul_(scale[:, None]).sub_(rows)
        if importance is None:
            error = difference.abs_().pow_(recipe.norm).sum(dim=1)
        else:
            error = difference.square_().mul_(importance).sum(dim=1)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return best_scale


def activation_range(x: Tensor, grid: Grid, recipe: RangeRecipe) -> Range:
    """Returns the range of one batch of activations, found by the recipe's method."""
    x = x.detach().float()
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    if recipe.activation == "minmax" or high - low < _TINY:
        return Range(low, high)
    centers, weights = _histogram(x, low, high)
    if recipe.activation == "search":
        return _search_threshold(centers, weights, low, high, grid, recipe)
    return _search_pair(centers, weights, low, high, grid, recipe)


def symmetric_scale(x: Tensor, grid: Grid, recipe: RangeRecipe) -> float:
    """Returns the scale of a signed grid with zero-point 0, for attention's queries, keys and values."""
    largest = max(x.detach().float().abs().max().item(), _TINY)
    if recipe.activation == "minmax":
        return largest / grid.quant_max
    centers, weights = _histogram(x.detach().float(), -largest, largest)
    scales = torch.arange(1, recipe.num_candidates + 1, device=x.device) * (
        largest / grid.quant_max / recipe.num_candidates
    )
    errors = _errors(centers, weights, scales, torch.zeros_like(scales), grid, recipe.norm)
    return float(scales[errors.argmin()])


def _histogram(x: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    counts = torch.histc(x, bins=_NUM_BINS, min=low, max=high)
    width = (high - low) / _NUM_BINS
    centers = low + width * (torch.arange(_NUM_BINS, device=x.device, dtype=torch.float32) + 0.5)
    filled = counts > 0
    return centers[filled], counts[filled] / counts.sum()


def _errors(centers: Tensor, weights: Tensor, scales: Tensor, zero_points: Tensor, grid: Grid, norm: float) -> Tensor:
    """Returns the L_p error of each candidate grid, shape of `scales` `[K]`."""
    scales, zero_points = scales[:, None], zero_points[:, None]
    codes = ((centers / scales).round() + zero_points).clamp(grid.quant_min, grid.quant_max)
    error = ((codes - zero_points) * scales - centers).abs_().pow_(norm)
    return error @ weights


def _search_threshold(
    centers: Tensor, weights: Tensor, low: float, high: float, grid: Grid, recipe: RangeRecipe
) -> Range:
    fractions = torch.arange(1, recipe.num_candidates + 1, device=centers.device) / recipe.num_candidates
    two_sided = low < 0 < high
    largest = max(-low, high)
    steps = grid.quant_max // 2 if two_sided else grid.quant_max
    zero_point = (grid.quant_max + 1) // 2 if two_sided else (0 if high > 0 else grid.quant_max)
    scales = fractions * (largest / steps)
    errors = _errors(centers, weights, scales, torch.full_like(scales, zero_point), grid, recipe.norm)
    scale = float(scales[errors.argmin()])
    return Range(-zero_point * scale, (grid.quant_max - zero_point) * scale)


def _search_pair(centers: Tensor, weights: Tensor, low: float, high: float, grid: Grid, recipe: RangeRecipe) -> Range:
    device = centers.device
    fractions = torch.arange(1, recipe.num_candidates + 1, device=device) / recipe.num_candidates
    natural = round(-low / (high - low) * grid.quant_max)
    spread = torch.linspace(0, grid.quant_max, min(_NUM_ZERO_POINTS, grid.quant_max + 1), device=device).round()
    zero_points = torch.cat((spread, torch.tensor([float(natural)], device=device))).unique()
    if low == 0.0:
        zero_points = zero_points[:1]
    scales, zero_points = torch.meshgrid(fractions * ((high - low) / grid.quant_max), zero_points, indexing="ij")
    scales, zero_points = scales.flatten(), zero_points.flatten()
    best = int(_errors(centers, weights, scales, zero_points, grid, recipe.norm).argmin())
    scale, zero_point = float(scales[best]), float(zero_points[best])
    return Range(-zero_point * scale, (grid.quant_max - zero_point) * scale)
