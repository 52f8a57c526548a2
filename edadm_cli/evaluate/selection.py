"""Selects the metrics that an evaluation computes, with the reasons why others are left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from edadm_cli.errors import InputError, UsageError
from edadm_cli.metrics.base import Metric, Need
from edadm_cli.metrics.paired import ALWAYS


class MetricSelection:
    """The metrics to compute; metrics are removed when something that they need is missing.

    Args:
        metrics: Every metric that the model can have.
        named: The metrics that the user named; if empty, the default ones are computed.
        space: Name of the model's feature space.

    Raises:
        UsageError: A named metric does not exist for this model.
    """

    def __init__(self, metrics: Mapping[str, Metric], named: Sequence[str], space: str) -> None:
        for name in named:
            if name not in metrics:
                raise UsageError(f"There is no metric '{name}' for this model; there are {', '.join(metrics)}.")
        self.named = frozenset(named)
        self.selected = {
            name: metric
            for name, metric in metrics.items()
            if (name in named or name in ALWAYS if named else metric.default_in(space))
        }
        self.skipped: dict[str, str] = {}

    def drop(self, names: Iterable[str], reason: str) -> None:
        """Leaves some metrics out, with the reason.

        Raises:
            InputError: The user named one of them.
        """
        for name in list(names):
            self._require_not_named(name, reason)
            del self.selected[name]
            self.skipped[name] = reason

    def needing(self, *needs: Need) -> list[str]:
        """Returns the names of the selected metrics that need at least one of some inputs."""
        return [name for name, metric in self.selected.items() if metric.needs & set(needs)]

    def forget_prompts(self) -> None:
        """Leaves out the metrics of prompts, without a warning, for a model that takes none.

        Raises:
            InputError: The user named one of them.
        """
        for name in self.needing("prompts", "labels"):
            self._require_not_named(name, "the model takes no prompts.")
            del self.selected[name]

    def drop_without_real(self, has_statistics: Iterable[str], has_images: bool) -> None:
        """Leaves out the metrics that the available real images do not allow.

        Args:
            has_statistics: The layers whose real statistics are known.
            has_images: Whether there are real images.
        """
        if has_images:
            return
        known = set(has_statistics)
        missing = self.needing("real_images")
        missing += [name for name in self.needing("real_statistics") if self.selected[name].layer not in known]
        reason = (
            "statistics of real images are not enough for it (--real DIR with the images)."
            if known
            else "there are no real images (--real DIR, or an npz file of statistics)."
        )
        self.drop(missing, reason)

    def drop_too_few(self, num_images: int) -> None:
        """Leaves out the metrics that need more images than there are."""
        few = [(name, metric.min_images) for name, metric in self.selected.items() if num_images < metric.min_images]
        for name, least in few:
            self.drop([name], f"it needs more than {least - 1} images.")

    def _require_not_named(self, name: str, reason: str) -> None:
        if name in self.named:
            raise InputError(f"{name} cannot be computed: {reason}")
