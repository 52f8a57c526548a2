"""Decides the open choices of a selection, without reading the trajectories."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from edadm_cli.artifacts import Artifact, BuildSpec, read_tensor_header
from edadm_cli.config import EARLIER_DENSITY_QUANTILE, LOCAL_DENSITY_QUANTILE, SelectConfig
from edadm_cli.errors import UsageError
from edadm_cli.models.collected import FEATURES_FILE, TIMESTEPS, CollectedRun, timesteps_of
from edadm_cli.select.strategies import SelectionStrategy, strategy_named

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Task:
    """A configuration whose open choices are all decided, with its trajectories.

    Attributes:
        config: The configuration.
        strategy: How the samples are shared out over the steps.
        collected: The run with the trajectories.
        artifact: The part of the `collect` artifact that belongs to one denoiser.
        num_steps: T, the number of sampler steps.
        num_trajectories: The number of trajectories.
        num_samples: N, the number of samples.
        variety_weight: lambda, the weight of the variety.
        radius: r, the distance within which two steps count as similar; `None` if a quantile of the distances decides.
    """

    config: SelectConfig
    strategy: SelectionStrategy
    collected: CollectedRun
    artifact: Artifact
    num_steps: int
    num_trajectories: int
    num_samples: int
    variety_weight: float
    radius: float | None

    @cached_property
    def timesteps(self) -> Tensor:
        """The scheduler's value at each step, with shape `(T,)`."""
        return timesteps_of(self.artifact)

    @property
    def quantile(self) -> float:
        """The share of the pairs of steps that lie within the radius, if no radius is given."""
        return LOCAL_DENSITY_QUANTILE if self.config.density_quantile is None else self.config.density_quantile

    @property
    def radius_source(self) -> str | None:
        """Where r comes from, in words for the report; `None` for strategies without a radius."""
        if not self.strategy.uses_scores:
            return None
        if self.config.density_radius is not None:
            return "given"
        if self.radius is not None:
            return "the model's published one"
        missing = "the model has no published one: " if self.config.model_radius else ""
        return f"{missing}{self.quantile:.0%} quantile of the pairwise distances"

    def build_spec(self) -> BuildSpec:
        """Returns the specification of the artifact."""
        fields = {
            **self.config.identity_fields(),
            "num_samples": self.num_samples,
            "variety_weight": self.variety_weight if self.strategy.uses_scores else None,
        }
        fields.pop("model_radius", None)
        fields.pop("density_quantile", None)
        if self.strategy.uses_scores:
            fields["density_radius"] = self.radius
            if self.radius is None and self.quantile != EARLIER_DENSITY_QUANTILE:
                fields["density_quantile"] = self.quantile
        return BuildSpec("select", None, fields, self.config.seed, (self.collected.artifact,), self.collected.model)


def resolve_task(config: SelectConfig, collected: CollectedRun, place: str = "") -> Task:
    """Decides what the configuration leaves open for the trajectories of one denoiser.

    Args:
        config: The configuration.
        collected: The run with the trajectories.
        place: Which denoiser, one of `CollectedRun.places`.

    Raises:
        UsageError: There is no such strategy, there are fewer samples than are asked for, or a setting belongs to
            another strategy.
    """
    strategy = strategy_named(config.strategy)
    part = collected.artifact.within(place)
    num_trajectories = collected.num_trajectories
    num_steps = read_tensor_header(part.file(FEATURES_FILE))[TIMESTEPS].shape[0]
    num_samples = config.num_samples or num_trajectories * min(config.samples_per_trajectory, num_steps)
    if num_samples > num_trajectories * num_steps:
        raise UsageError(
            f"{num_samples} samples were asked for, and {num_trajectories} trajectories of {num_steps} steps have"
            f" {num_trajectories * num_steps}.",
            hint=f"edadm collect --num-trajectories {-(-num_samples // num_steps)} --force",
        )
    if not strategy.uses_scores:
        _refuse_settings_of_scores(config)
    default_weight = collected.entry.variety_weight
    radius = collected.entry.density_radius if config.model_radius and strategy.uses_scores else None
    return Task(
        config=config,
        strategy=strategy,
        collected=collected,
        artifact=part,
        num_steps=num_steps,
        num_trajectories=num_trajectories,
        num_samples=num_samples,
        variety_weight=default_weight if config.variety_weight is None else config.variety_weight,
        radius=radius if config.density_radius is None else config.density_radius,
    )


def _refuse_settings_of_scores(config: SelectConfig) -> None:
    """Refuses the settings of density and variety, for a strategy that reads neither."""
    for name in ("density_radius", "variety_weight", "density_quantile"):
        if getattr(config, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} belongs to the strategy tdac and has no meaning for {config.strategy}.")
