r"""Searches the grid of a tensor: min-max, or the range that minimises an L_p error.

    weights:      scale_c = argmin over thresholds t of sum |w_c - w_hat_c(t)|^p, one scale per output channel; or of
                  sum_k E[x_k^2] (w_ck - w_hat_ck(t))^2, the error of the outputs
    activations:  symmetric, or one-sided where all values have one sign: the same over one threshold per tensor
    asymmetric:   argmin over (width, zero-point) pairs

The errors of activations are computed on a histogram of the tensor, so that their cost does not depend on its size. The
search does not read results back from the device, so that many tensors are searched without synchronization.

References:
    EDA-DM, arXiv 2401.04585, section 4.1 (p = 2.4, 100 candidates).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edadm_cli.quant.grid import Grid
from edadm_cli.quant.histogram import Histogram
from edadm_cli.recipe import RangeRecipe

_NUM_ZERO_POINTS = 17  # that are tried besides the natural one, spread over the codes
_ELEMENTS_CPU, _ELEMENTS_GPU = 1 << 18, 1 << 26
"""The elements of a table of candidates and bins that is computed at once. On a CPU the table fits into the cache."""
_TINY = 1e-8


@dataclass(frozen=True)
class Range:
    """The values that a grid covers.

    Attributes:
        low: The smallest value, at most 0.
        high: The largest value, at least 0.
    """

    low: float
    high: float

    def parameters(self, grid: Grid) -> tuple[float, int]:
        """Returns scale and zero-point of an unsigned grid that covers the range and holds zero exactly."""
        steps = grid.quant_max - grid.quant_min
        scale = max((self.high - self.low) / steps, _TINY)
        zero_point = round(grid.quant_min - self.low / scale)
        return scale, int(min(max(zero_point, grid.quant_min), grid.quant_max))


def input_energy(energy: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """Returns E[x^2] of the input of each weight, in the shape of `weight` `(C_out, C_in / groups, ...)`.

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
        grid: The grid of its codes.
        recipe: The recipe's ranges.
        energy: E[x^2] of the input of each weight, in the shape of `weight`; see `input_energy`.
    """
    rows = weight.detach().float().reshape(weight.shape[0], -1)
    largest = rows.abs().amax(dim=1).clamp_min(_TINY)
    full = largest / grid.quant_max
    if recipe.weight == "minmax":
        return full
    energy = None if energy is None else energy.reshape(rows.shape)
    best_scale, best_error = full, torch.full_like(full, torch.inf)
    for candidate in range(1, recipe.num_candidates + 1):
        scale = full * (candidate / recipe.num_candidates)
        codes = (rows / scale[:, None]).round_().clamp_(grid.quant_min, grid.quant_max)
        difference = codes.mul_(scale[:, None]).sub_(rows)
        if energy is None:
            error = difference.abs_().pow_(recipe.norm).sum(dim=1)
        else:
            error = difference.square_().mul_(energy).sum(dim=1)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return best_scale


def activation_range(histogram: Histogram, grid: Grid, recipe: RangeRecipe) -> Tensor:
    """Returns the range of activations by the recipe's method, `(low, high)`, as a float32 tensor on their device.

    Args:
        histogram: The values of the activations.
        grid: The unsigned grid of their codes.
        recipe: The recipe's ranges.
    """
    low, high = histogram.low, histogram.high
    if recipe.activation == "minmax":
        return torch.stack((low, high))
    scales, zero_points = (_thresholds if recipe.activation == "search" else _pairs)(low, high, grid, recipe)
    best = _errors(histogram, scales, zero_points, grid, recipe.norm).argmin()
    scale, zero_point = scales[best], zero_points[best]
    searched = torch.stack((-zero_point * scale, (grid.quant_max - zero_point) * scale))
    return torch.where(high - low < _TINY, torch.stack((low, high)), searched)


def symmetric_scale(histogram: Histogram, grid: Grid, recipe: RangeRecipe) -> Tensor:
    """Returns the scale `()` of a signed grid with zero-point 0, for attention's queries, keys and values."""
    full = torch.maximum(-histogram.low, histogram.high).clamp_min(_TINY) / grid.quant_max
    if recipe.activation == "minmax":
        return full
    scales = _fractions(full, recipe) * full
    return scales[_errors(histogram, scales, torch.zeros_like(scales), grid, recipe.norm).argmin()]


def _errors(histogram: Histogram, scales: Tensor, zero_points: Tensor, grid: Grid, norm: float) -> Tensor:
    """Returns the L_p error of each candidate grid, in the shape `(K,)` of `scales`."""
    centers, shares = histogram.bins()
    errors = []
    at_once = max(1, (_ELEMENTS_GPU if scales.is_cuda else _ELEMENTS_CPU) // len(centers))
    for scale, zero_point in zip(scales[:, None].split(at_once), zero_points[:, None].split(at_once), strict=True):
        codes = (centers / scale).round_().clamp_(grid.quant_min - zero_point, grid.quant_max - zero_point)
        errors.append(codes.mul_(scale).sub_(centers).abs_().pow_(norm) @ shares)
    return torch.cat(errors)


def _fractions(like: Tensor, recipe: RangeRecipe) -> Tensor:
    """Returns the shares of the whole range that a search tries, with shape `(num_candidates,)`."""
    return torch.arange(1, recipe.num_candidates + 1, device=like.device) / recipe.num_candidates


def _thresholds(low: Tensor, high: Tensor, grid: Grid, recipe: RangeRecipe) -> tuple[Tensor, Tensor]:
    """Returns scales and zero-points, `(K,)` each, of ranges that are symmetric or have one side."""
    two_sided = (low < 0) & (high > 0)
    steps = torch.where(two_sided, grid.quant_max // 2, grid.quant_max)
    one_sided = torch.where(high > 0, 0, grid.quant_max)
    zero_point = torch.where(two_sided, (grid.quant_max + 1) // 2, one_sided).float()
    scales = _fractions(low, recipe) * (torch.maximum(-low, high) / steps)
    return scales, zero_point.expand_as(scales)


def _pairs(low: Tensor, high: Tensor, grid: Grid, recipe: RangeRecipe) -> tuple[Tensor, Tensor]:
    """Returns scales and zero-points, `(K,)` each, of every pair of a width and a zero-point."""
    width = (high - low).clamp_min(_TINY)
    natural = (-low / width * grid.quant_max).round()
    spread = torch.linspace(0, grid.quant_max, min(_NUM_ZERO_POINTS, grid.quant_max + 1), device=low.device).round()
    zero_points = torch.cat((spread, natural[None]))
    zero_points = torch.where(low == 0, 0, zero_points)  # data of one sign use all codes
    if not low.is_cuda:  # on a GPU this would need a synchronization
        zero_points = zero_points.unique()
    scales = _fractions(low, recipe) * (width / grid.quant_max)
    grids = torch.meshgrid(scales, zero_points, indexing="ij")
    return grids[0].flatten(), grids[1].flatten()
