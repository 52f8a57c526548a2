r"""Temporal distribution alignment calibration (TDAC): decides the number of samples per step.

For steps $i, j$ with mid-block features $F_i$ of shape `(B, C, *)`:

- density $D_i = \#\{j \neq i : \mathrm{mean}((F_i - F_j)^2) \le r\}$: the number of steps similar to step $i$;
- variety $V_i = \sum_{j \neq i} \sum_{b, p} (1 - \cos_C(F_i, F_j))$ over batch and positions: how much it
  differs from the others;
- both min-max normalised over the steps, $w_i = D_i + \lambda V_i$, share $w_i / \sum_k w_k$;
- counts: the shares of $N$ rounded, then corrected to sum to $N$ (`strategies.Tdac`).

Both scores come from inner products of features, accumulated in double precision over slices of the feature
axis: one pass of matrix products instead of a comparison for each pair.

References:
    EDA-DM, arXiv 2401.04585, section 4.1, equations 5 to 8.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edadm_cli.config import LOCAL_DENSITY_QUANTILE

_SLICE_ELEMENTS = 2**22  # elements of the double-precision slice that is in memory at a time
_ROUNDING = 1e-12  # relative size below which a difference of inner products is rounding
_TIE = 1e-9  # relative spread below which scores count as equal


@dataclass(frozen=True)
class Scores:
    """The scores of the steps.

    Attributes:
        distances: Mean squared difference of the features of two steps, with shape `(T, T)`, float64.
        variety: V before normalisation, with shape `(T,)`, float64.
    """

    distances: Tensor
    variety: Tensor


@dataclass(frozen=True)
class NormalisedScores:
    """The scores that decide the number of samples per step.

    Attributes:
        density: D, normalised to [0, 1], with shape `(T,)`.
        variety: V, normalised to [0, 1], with shape `(T,)`.
        radius: The radius r of the density.
    """

    density: Tensor
    variety: Tensor
    radius: float


def score_steps(features: Tensor) -> Scores:
    """Compares the features of all pairs of steps.

    Args:
        features: Mid-block features with shape `(T, B, C, *)`.
    """
    return score_slices(features.split(rows_at_once(features.shape), dim=1))


def rows_at_once(shape: Sequence[int]) -> int:
    """Returns the number of rows of features `(T, B, C, *)` that are compared at a time."""
    return max(1, _SLICE_ELEMENTS // (shape[0] * math.prod(shape[2:])))


def score_slices(slices: Iterable[Tensor]) -> Scores:
    """Compares the features of all pairs of steps, with only a few rows in memory at a time.

    Args:
        slices: Mid-block features with shape `(T, b, C, *)`, the rows in any portions.
    """
    inner = cosine = torch.zeros((), dtype=torch.float64)
    num_channels = num_positions = 0
    for rows in slices:
        num_channels = rows.shape[2]
        maps = rows.reshape(*rows.shape[:3], -1)  # [T, b, C, P]
        num_positions += maps.shape[1] * maps.shape[3]
        for part in _positions(maps):
            unit = part / part.norm(dim=2, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
            inner = inner + part.flatten(1) @ part.flatten(1).T
            cosine = cosine + unit.flatten(1) @ unit.flatten(1).T
    return Scores(_distances(inner, num_channels * num_positions), _variety(cosine, num_positions))


def quantile_distance(distances: Tensor, quantile: float) -> float:
    """Returns the distance that a share `quantile` of the pairs of steps does not exceed; 0 for a single step.

    A low quantile makes the density local, so that it carries other information than the variety. With the median, the
    two are nearly opposite, and their sum is almost constant.
    """
    pairs = distances[torch.ones_like(distances, dtype=torch.bool).triu(1)]
    if not pairs.numel():
        return 0.0
    return float(pairs.kthvalue(max(1, math.ceil(quantile * pairs.numel()))).values)


def density(distances: Tensor, radius: float) -> Tensor:
    """Returns D before normalisation: for each step, the number of other steps within `radius`."""
    return (distances <= radius).sum(dim=1) - 1  # every step is within its own radius


def normalise(scores: Tensor) -> Tensor:
    """Normalises scores to [0, 1] by minimum and maximum; scores that are all equal become zeros."""
    scores = scores.double()
    low, high = scores.min(), scores.max()
    if float(high - low) <= _TIE * max(abs(float(high)), abs(float(low))):
        return torch.zeros_like(scores)
    return (scores - low) / (high - low)


def normalised_scores(
    scores: Scores, radius: float | None, quantile: float = LOCAL_DENSITY_QUANTILE
) -> NormalisedScores:
    """Returns density and variety, each normalised over the steps.

    Args:
        scores: The result of `score_steps`.
        radius: r; `None` for the distance that a share `quantile` of the pairs of steps does not exceed.
        quantile: The share of pairs for a radius of `None`.
    """
    radius = quantile_distance(scores.distances, quantile) if radius is None else radius
    return NormalisedScores(normalise(density(scores.distances, radius)), normalise(scores.variety), radius)


def integer_counts(weights: Tensor, num_samples: int) -> Tensor:
    """Returns integer counts in proportion to `weights` that sum to `num_samples` and are never negative.

    The steps with the largest counts get one more each if the rounded counts are too few. The last steps, backwards,
    lose one each if they are too many. Both are repeated as often as needed. Weights that are all zero count as equal.

    Args:
        weights: Non-negative weights with shape `(T,)`.
        num_samples: N.
    """
    weights = weights.double()
    total = weights.sum()
    shares = weights / total if total > 0 else torch.full_like(weights, 1 / len(weights))
    counts = (shares * num_samples).round().long()
    shortfall = num_samples - int(counts.sum())
    if shortfall > 0:
        largest_first = counts.argsort(descending=True, stable=True)
        each, rest = divmod(shortfall, len(counts))
        counts += each
        counts[largest_first[:rest]] += 1
    while shortfall < 0:
        giving = (counts > 0).nonzero().flatten().flip(0)[:-shortfall]
        counts[giving] -= 1
        shortfall += len(giving)
    return counts


def _positions(maps: Tensor) -> Iterator[Tensor]:
    """Yields maps `(T, b, C, P)` in double precision, a bounded number of positions at a time."""
    columns = max(1, _SLICE_ELEMENTS // (maps.shape[0] * maps.shape[2]))  # pairs of row and position
    positions = min(maps.shape[3], columns)
    for position in range(0, maps.shape[3], positions):
        yield maps[:, :, :, position : position + positions].double()


def _distances(inner: Tensor, num_elements: int) -> Tensor:
    squares = inner.diagonal()
    sums = squares[:, None] + squares[None, :]
    distances = sums - 2 * inner
    distances[distances <= _ROUNDING * sums] = 0
    distances.fill_diagonal_(0)
    return (distances + distances.T) / (2 * num_elements)


def _variety(cosine: Tensor, num_positions: int) -> Tensor:
    apart = num_positions - cosine
    apart[apart <= _ROUNDING * num_positions] = 0
    apart.fill_diagonal_(0)
    return apart.sum(dim=1)
