"""All metrics: those of this package in the order in which they are shown, then those of other packages."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from edadm_cli.metrics import clip, in_features, lpips, paired
from edadm_cli.metrics.base import Metric
from edadm_cli.plugins import with_plugins

GROUP = "edadm.metrics"
_SHIPPED: tuple[Metric, ...] = (*in_features.METRICS, *clip.METRICS, *paired.METRICS, *lpips.METRICS)

ONE_STEP = {"one_step_rel_l2": "One-step error", "guided_one_step_rel_l2": "Guided one-step error"}
"""The labels of the errors of single predictions, which no metric object computes."""


@cache
def metrics() -> dict[str, Metric]:
    """Returns all metrics by name.

    Raises:
        MachineError: Another package's metric cannot be loaded, or its name is in use already.
    """
    return with_plugins(_SHIPPED, GROUP, Metric)


def label_of(name: str) -> str:
    """Returns the label of a metric, or its name if it is not registered."""
    return metrics()[name].label if name in metrics() else ONE_STEP.get(name, name.replace("_", " "))


def metrics_of(space: str) -> dict[str, Metric]:
    """Returns the metrics of models that are measured in a feature space, by name."""
    return {name: metric for name, metric in metrics().items() if metric.applies(space)}


def in_order(names: Iterable[str]) -> list[str]:
    """Returns names of metrics in the order in which they are shown; unregistered names come last."""
    known = list(metrics())
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))
