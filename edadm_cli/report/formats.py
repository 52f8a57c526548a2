"""Formats metrics, numbers and settings for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edadm_cli.metrics import registry
from edadm_cli.metrics.registry import metrics

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MINUS = "\u2212"
NOTHING = "\u2013"


@dataclass(frozen=True)
class MetricLabel:
    """The label and the direction of a metric.

    Attributes:
        label: Its name for people.
        better: `lower`, `higher`, or empty if neither is known to be better.
        percent: Whether it is shown as a percentage.
        unit: Its unit; empty if it has none.
    """

    label: str
    better: str
    percent: bool = False
    unit: str = ""


def label_of(name: str) -> MetricLabel:
    """Returns the label of a metric; the label of a metric that is not registered is its name."""
    metric = metrics().get(name)
    if metric is None:
        return MetricLabel(registry.label_of(name), "lower" if name in registry.ONE_STEP else "")
    return MetricLabel(metric.label, metric.better, metric.percent, metric.unit)


def metric_value(name: str, value: float | None) -> str:
    """Returns a metric's value for people: a share as a percentage, any other value with its unit."""
    label = label_of(name)
    if label.percent:
        return percentage(value)
    return f"{number(value)}\u00a0{label.unit}" if label.unit and value is not None else number(value)


def number(value: float | None, digits: int = 4) -> str:
    """Returns a number with some significant digits; very small and very large ones as a power of ten."""
    if value is None:
        return NOTHING
    if isinstance(value, int) or value == 0:
        return f"{value:,.0f}".replace("-", MINUS)
    exponent = math.floor(math.log10(abs(value)))
    if -4 <= exponent < 7:
        decimals = max(0, digits - 1 - exponent)
        return f"{value:,.{decimals}f}".replace("-", MINUS)
    mantissa, power = f"{value:.{digits - 2}e}".split("e")
    return f"{mantissa.replace('-', MINUS)} \u00d7 {power_of_ten(10.0 ** int(power))}"


def power_of_ten(value: float) -> str:
    """Returns a power of ten in short form, such as 10⁻³."""
    return f"10{str(round(math.log10(value))).translate(_SUPERSCRIPTS)}"


def percentage(share: float | None) -> str:
    """Returns a share of one as a percentage."""
    return NOTHING if share is None else f"{100 * share:.4g}\u00a0%"


def mebibytes(size: float | None) -> str:
    """Returns a size given in MiB."""
    if size is None:
        return NOTHING
    if size >= 0.01:
        return f"{size:,.2f}\u00a0MiB"
    return f"{size * 1024:,.2f}\u00a0KiB"


def seconds(value: float | None) -> str | None:
    """Returns a duration given in seconds."""
    if value is None:
        return None
    if value < 120:
        return f"{value:.1f}\u00a0s"
    return f"{value / 60:.1f}\u00a0min"


def plain(value: Any) -> str:
    """Returns a setting's value in the form in which a user gives it."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(item) for item in value) or NOTHING
    return f"{value:g}" if isinstance(value, float) else str(value)


def flat(fields: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Returns nested settings under dotted names."""
    pairs: list[tuple[str, Any]] = []
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            pairs += flat(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
            for index, item in enumerate(value):
                pairs += flat(item, f"{prefix}{name}.{index}.")
        else:
            pairs.append((f"{prefix}{name}", None if isinstance(value, Mapping) else value))
    return pairs


def count(amount: int, noun: str) -> str:
    """Returns an amount with a noun, in the plural unless it is one."""
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"
