"""Strategies that decide the number of calibration samples per step without features, to compare TDAC with.

Steps are counted in the sampler's order, so the last step is the cleanest.

References:
    Q-Diffusion, arXiv 2302.04304 (equal counts); PTQ4DM, arXiv 2211.15736 (a normal distribution skewed to
    the clean end).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NORMAL_MEAN, NORMAL_DEVIATION = 0.4, 0.4
"""Mean and standard deviation of `normal_counts`, in shares of T, counted from the clean end."""


def uniform_counts(num_steps: int, num_samples: int) -> Tensor:
    """Returns equal counts; a remainder is spread evenly over the steps."""
    edges = torch.arange(num_steps + 1) * num_samples // num_steps
    return edges.diff()


def random_counts(num_steps: int, num_samples: int, generator: torch.Generator) -> Tensor:
    """Returns counts of steps that are chosen uniformly at random, one per sample."""
    steps = torch.randint(num_steps, (num_samples,), generator=generator)
    return torch.bincount(steps, minlength=num_steps)


def last_counts(num_steps: int, num_samples: int) -> Tensor:
    """Returns counts that take every sample from the last, cleanest step."""
    counts = torch.zeros(num_steps, dtype=torch.long)
    counts[-1] = num_samples
    return counts


def normal_counts(num_steps: int, num_samples: int, generator: torch.Generator) -> Tensor:
    r"""Returns counts of steps from a normal distribution that is skewed to the clean end, one step per sample.

    The distance from the clean end is $u \sim N(0.4\,T, (0.4\,T)^2)$, truncated to $[0, T)$ by inverting its
    cumulative distribution function, so that nothing piles up at the ends.
    """
    low, high = (_normal_cdf((edge - NORMAL_MEAN) / NORMAL_DEVIATION) for edge in (0.0, 1.0))
    level = low + (high - low) * torch.rand(num_samples, generator=generator, dtype=torch.float64)
    share = NORMAL_MEAN + NORMAL_DEVIATION * torch.special.ndtri(level)
    from_the_end = (share * num_steps).long().clamp(0, num_steps - 1)
    return torch.bincount(num_steps - 1 - from_the_end, minlength=num_steps)


def _normal_cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))
