"""Prints the counts of samples per step beside the errors that they should follow, from rows that learned nothing.

TDAC takes more samples from steps that it rates higher. The error of single predictions at each step, with ranges
alone, says where quantization hurts.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

LABEL, BITS = "ranges-only", "w4a8"
PARTS = ("first fifth", "second", "third", "fourth", "last fifth")


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Returns a Markdown table: per model, the samples of each fifth of the steps and the root mean square error."""
    lines = [
        f"| model | | {' | '.join(PARTS)} | last step | rank correlation |",
        f"|---|---|{'---|' * (len(PARTS) + 2)}",
    ]
    rows = [row for row in results if (row["label"], row["bits"]) == (LABEL, BITS) and "steps" in row]
    for model in sorted({row["model"] for row in rows}, reverse=True):
        seeds = [row for row in rows if row["model"] == model]
        counts = [statistics.mean(values) for values in zip(*(row["counts"] for row in seeds), strict=True)]
        errors = [statistics.mean(values) for values in zip(*(row["steps"] for row in seeds), strict=True)]
        related = [statistics.correlation(_ranks(row["counts"]), _ranks(row["steps"])) for row in seeds]
        samples = [f"{sum(part):.0f}" for part in _fifths(counts)]
        sizes = [f"{statistics.mean(error**2 for error in part) ** 0.5:.3f}" for part in _fifths(errors)]
        lines.append(f"| `{model}` | samples | {' | '.join([*samples, f'{counts[-1]:.0f}'])} | |")
        shown = " and ".join(f"{value:.2f}" for value in related)
        lines.append(f"| `{model}` | error of one step | {' | '.join([*sizes, f'{errors[-1]:.3f}'])} | {shown} |")
    return "\n".join(lines)


def _ranks(values: Sequence[float]) -> list[float]:
    """Returns the rank of each value; equal values share the mean of their ranks."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def _fifths(values: Sequence[float]) -> list[Sequence[float]]:
    edges = [len(values) * number // len(PARTS) for number in range(len(PARTS) + 1)]
    return [values[start:end] for start, end in pairwise(edges)]
