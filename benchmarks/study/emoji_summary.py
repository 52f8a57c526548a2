"""Prints what each bit width costs on each model, in one table that compares the widths of one recipe."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from learner_table import narrowness

from study.emoji_rows import FULL_PRECISION

HEADINGS = {"final": "distance", "top1": "names that rank first"}
Row = Mapping[str, Any]


def table(results: Sequence[Row], label: str) -> str:
    """Returns a Markdown table with a line per bit width: means over the seeds, whose number is in brackets.

    The names that rank first are a share at full precision. At other widths they are the difference to full precision
    with the same seeds, in points.

    Args:
        results: The rows of a study, all with as many pictures.
        label: The recipe.
    """
    exact = {(row["model"], row["seed"]): row for row in results if row["label"] == FULL_PRECISION}
    rows = [row for row in results if row["label"] == label]
    models = sorted({row["model"] for row in rows}, reverse=True)
    columns = [(model, metric) for model in models for metric in HEADINGS if _has(rows, model, metric)]
    headings = ["`--bits`", "bits per weight", *(f"`{model}`: {HEADINGS[metric]}" for model, metric in columns)]
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    cells = [_exact([row for (its, _), row in exact.items() if its == model], metric) for model, metric in columns]
    lines.append(f"| full precision | 32 | {' | '.join(cells)} |")
    for bits in sorted({row["bits"] for row in rows}, key=narrowness):
        facts = [f"`{bits}`", f"{-narrowness(bits)[1]:g}"]
        cells = []
        for model, metric in columns:
            seeds = [row for row in rows if (row["model"], row["bits"]) == (model, bits)]
            cells.append(_cell(seeds, [exact[model, row["seed"]] for row in seeds], metric))
        lines.append(f"| {' | '.join([*facts, *cells])} |")
    return "\n".join(lines)


def _has(rows: Sequence[Row], model: str, metric: str) -> bool:
    return any(row["model"] == model and metric in row for row in rows)


def _exact(rows: Sequence[Row], metric: str) -> str:
    return f"{statistics.mean(row[metric] for row in rows):.1%} ({len(rows)})" if metric == "top1" else ""


def _cell(rows: Sequence[Row], exact: Sequence[Row], metric: str) -> str:
    if not rows:
        return ""
    if metric != "top1":
        return f"{statistics.mean(row[metric] for row in rows):.3g} ({len(rows)})"
    points = 100 * statistics.mean(row[metric] - same[metric] for row, same in zip(rows, exact, strict=True))
    return f"{points:+.1f} ({len(rows)})"
