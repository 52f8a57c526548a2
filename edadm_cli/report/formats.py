"""Figures as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MINUS = "\u2212"
NOTHING = "\u2013"


@dataclass(frozen=True)
class Figure:
    """How a figure of quality is called and read."""

    label: str
    better: str
    percent: bool = False


FIGURES: dict[str, Figure] = {
    "frechet_distance": Figure("Fréchet distance", "lower"),
    "spatial_frechet_distance": Figure("Fréchet distance, spatial", "lower"),
    "fid": Figure("FID", "lower"),
    "sfid": Figure("sFID", "lower"),
    "kernel_distance": Figure("Kernel distance", "lower"),
    "kid": Figure("KID", "lower"),
    "classifier_score": Figure("Classifier score", "higher"),
    "inception_score": Figure("Inception score", "higher"),
    "precision": Figure("Precision", "higher"),
    "recall": Figure("Recall", "higher"),
    "prompt_accuracy": Figure("Prompt accuracy", "higher", percent=True),
    "clip_score": Figure("CLIP score", "higher"),
}
"""In the order in which they are shown."""


def figure_of(name: str) -> Figure:
    """How a figure is called; one that is not known here keeps its name."""
    return FIGURES.get(name) or Figure(name.replace("_", " "), "")


def in_order(figures: Iterable[str]) -> list[str]:
    """Names of figures in the order in which they are shown, unknown ones last."""
    known = list(FIGURES)
    return sorted(figures, key=lambda name: (known.index(name) if name in FIGURES else len(known), name))


def figure_value(name: str, value: float | None) -> str:
    """A figure of quality: a share as a percentage, any other as a number."""
    return percentage(value) if figure_of(name).percent else number(value)


def number(value: float | None, digits: int = 4) -> str:
    """A number with some significant digits; very small and very large ones as a power of ten."""
    if value is None:
        return NOTHING
    if isinstance(value, int) or value == 0:
        return f"{value:,.0f}".replace("-", MINUS)
    exponent = math.floor(math.log10(abs(value)))
    if -4 <= exponent < 7:
        decimals = max(0, digits - 1 - exponent)
        return f"{value:,.{decimals}f}".replace("-", MINUS)
    mantissa = f"{value / 10.0**exponent:.{digits - 2}f}".replace("-", MINUS)
    return f"{mantissa} \u00d7 {power_of_ten(10.0**exponent)}"


def power_of_ten(value: float) -> str:
    """A power of ten as one, short: 10⁻³."""
    return f"10{str(round(math.log10(value))).translate(_SUPERSCRIPTS)}"


def percentage(share: float | None) -> str:
    """A share of one as a percentage."""
    return NOTHING if share is None else f"{100 * share:.4g}\u00a0%"


def mebibytes(size: float | None) -> str:
    """A size given in MiB."""
    if size is None:
        return NOTHING
    if size >= 0.01:
        return f"{size:,.2f}\u00a0MiB"
    return f"{size * 1024:,.2f}\u00a0KiB"


def seconds(value: float | None) -> str | None:
    """A duration given in seconds."""
    if value is None:
        return None
    if value < 120:
        return f"{value:.1f}\u00a0s"
    return f"{value / 60:.1f}\u00a0min"


def plain(value: Any) -> str:
    """A setting's value as it was given."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(item) for item in value) or NOTHING
    return f"{value:g}" if isinstance(value, float) else str(value)


def flat(fields: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings under dotted names."""
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
    """An amount of things, in the plural where it is not one."""
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"
