"""Strategies decide how many calibration samples each sampler step gives: TDAC, and others to compare it with.

A strategy is an instance of a subclass of `SelectionStrategy`. Another package adds one by an entry point of the group
`edadm.strategies`. `edadm select --strategy` and a recipe's `[select]` name it.

Only the functions that compute import torch, so that the name of a strategy can be checked without it.

References:
    EDA-DM, arXiv 2401.04585 (TDAC); Q-Diffusion, arXiv 2302.04304 (equal counts); PTQ4DM, arXiv 2211.15736 (a normal
    distribution skewed to the clean end).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar

from edadm_cli.errors import UsageError
from edadm_cli.plugins import with_plugins

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GROUP = "edadm.strategies"


@dataclass(frozen=True)
class ScoredSteps:
    """The steps that a strategy shares the samples out over, in the sampler's order: the last step is the cleanest.

    Attributes:
        timesteps: The scheduler's value at each step, with shape `(T,)`.
        density: The density of each step's features, normalised to [0, 1], with shape `(T,)`, float64.
        variety: The variety of each step's features, normalised to [0, 1], with shape `(T,)`, float64.
        variety_weight: lambda, the weight of the variety.
    """

    timesteps: Tensor
    density: Tensor
    variety: Tensor
    variety_weight: float

    def __len__(self) -> int:
        """Returns T, the number of steps."""
        return len(self.timesteps)


class SelectionStrategy(ABC):
    """One way to share calibration samples out over the steps.

    Attributes:
        name: The name after `--strategy` and in recipes.
        description: One sentence for the report.
        uses_scores: Whether density and variety decide. For other strategies, the settings of the scores are refused.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    uses_scores: ClassVar[bool] = False

    @abstractmethod
    def counts(self, steps: ScoredSteps, num_samples: int, generator: torch.Generator) -> Tensor:
        """Returns the number of samples from each step.

        Args:
            steps: The steps and their scores.
            num_samples: N, the number of samples.
            generator: The random generator of strategies that choose at random.

        Returns:
            Counts with shape `(T,)`, int64, which sum to N. None may exceed the number of trajectories.
        """

    def steps_from_the_clean_end(self, num_steps: int) -> dict[str, float] | None:
        """Returns mean and deviation of the distance from the last step; `None` without such a distribution."""
        return None


class Tdac(SelectionStrategy):
    """Shares the samples out in proportion to density plus lambda times variety; see `select.tdac`."""

    name = "tdac"
    description = "TDAC shares the samples out by the density and variety of each step's features."
    uses_scores = True

    def counts(self, steps: ScoredSteps, num_samples: int, generator: torch.Generator) -> Tensor:
        """Returns n_i, the rounded shares of equations 7 and 8."""
        from edadm_cli.select.tdac import integer_counts

        return integer_counts(steps.density + steps.variety_weight * steps.variety, num_samples)


class Uniform(SelectionStrategy):
    """Takes equally many samples from each step; a remainder is spread evenly over the steps."""

    name = "uniform"
    description = "Every step gives about as many samples."

    def counts(self, steps: ScoredSteps, num_samples: int, generator: torch.Generator) -> Tensor:
        """Returns equal counts."""
        from edadm_cli.models.denoiser_calls.trajectories import equal_counts

        return equal_counts(num_samples, len(steps))


class Normal(SelectionStrategy):
    r"""Chooses steps from a normal distribution that is skewed to the clean end, one step per sample.

    The distance from the clean end is $u \sim N(0.4\,T, (0.4\,T)^2)$, truncated to $[0, T)$ by inverting its
    cumulative distribution function, so that nothing piles up at the ends.
    """

    name = "normal"
    description = "The steps were chosen from a normal distribution."
    mean, deviation = 0.4, 0.4
    """Mean and standard deviation in shares of T, counted from the clean end."""

    def counts(self, steps: ScoredSteps, num_samples: int, generator: torch.Generator) -> Tensor:
        """Returns counts of random steps."""
        import torch

        num_steps = len(steps)
        low, high = (_normal_cdf((edge - self.mean) / self.deviation) for edge in (0.0, 1.0))
        level = low + (high - low) * torch.rand(num_samples, generator=generator, dtype=torch.float64)
        share = self.mean + self.deviation * torch.special.ndtri(level)
        from_the_end = (share * num_steps).long().clamp(0, num_steps - 1)
        return torch.bincount(num_steps - 1 - from_the_end, minlength=num_steps)

    def steps_from_the_clean_end(self, num_steps: int) -> dict[str, float]:
        """Returns mean and deviation in steps."""
        return {"mean": self.mean * num_steps, "deviation": self.deviation * num_steps}


class Random(SelectionStrategy):
    """Chooses steps uniformly at random, one per sample."""

    name = "random"
    description = "The steps were chosen at random."

    def counts(self, steps: ScoredSteps, num_samples: int, generator: torch.Generator) -> Tensor:
        """Returns counts of random steps."""
        import torch

        chosen = torch.randint(len(steps), (num_samples,), generator=generator)
        return torch.bincount(chosen, minlength=len(steps))


class Last(SelectionStrategy):
    """Takes every sample from the last, cleanest step."""

    name = "last"
    description = "Every sample comes from the last step."

    def counts(self, steps: ScoredSteps, num_samples: int, generator: torch.Generator) -> Tensor:
        """Returns counts that are zero for all other steps."""
        import torch

        counts = torch.zeros(len(steps), dtype=torch.long)
        counts[-1] = num_samples
        return counts


@cache
def strategies() -> dict[str, SelectionStrategy]:
    """Returns all strategies by name: those of this package, then those of other packages.

    Raises:
        MachineError: Another package's strategy cannot be loaded, or its name is in use already.
    """
    return with_plugins((Tdac(), Uniform(), Normal(), Random(), Last()), GROUP, SelectionStrategy)


def strategy_named(name: str) -> SelectionStrategy:
    """Returns the strategy of a name.

    Raises:
        UsageError: There is no strategy with this name.
    """
    if name not in strategies():
        raise UsageError(
            f"There is no strategy '{name[:200]}' for the calibration samples; there are {', '.join(strategies())}.",
            hint="edadm select --strategy tdac",
        )
    return strategies()[name]


def _normal_cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def total_variation(counts: Sequence[int]) -> float:
    """Returns how far counts are from equal ones, from 0 to 1: half the sum of |n_i / N - 1 / T| over the steps."""
    return sum(abs(count / sum(counts) - 1 / len(counts)) for count in counts) / 2
