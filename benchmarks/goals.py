"""Prints the goals for the recipe `default` beside what was measured, from the rows of both studies.

python benchmarks/goals.py docs/data/learner.jsonl docs/data/emoji.jsonl

A ratio is the mean over the seeds that both rows have; the number of seeds is in brackets. The best published recipe is
the one with the smallest mean final distance among those that were measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PUBLISHED = (
    "paper",
    "paper, 300 iterations",
    "q-diffusion, 2,500 iterations",
    "q-diffusion, 300 iterations",
    "ptq4dm",
)
Rows = Mapping[tuple[str, str, str], Mapping[int, Mapping[str, Any]]]
Outcome = tuple[str, bool] | None  # the text of a cell, and whether the goal is reached


def read(places: Sequence[Path]) -> Rows:
    """Returns the rows by model, bits and label, and by seed."""
    rows: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
    for place in places:
        for row in map(json.loads, place.read_text(encoding="utf-8").splitlines()):
            rows.setdefault((row["model"], row["bits"], row["label"]), {})[row["seed"]] = row
    return rows


def ratio(rows: Rows, model: str, metric: str, one: tuple[str, str], two: tuple[str, str]) -> tuple[float, int] | None:
    """Returns the ratio of the means of a metric over the seeds of both rows, given by bits and label."""
    first, second = (rows.get((model, *row), {}) for row in (one, two))
    seeds = [seed for seed in first if metric in first[seed] and metric in second.get(seed, {})]
    if not seeds:
        return None
    means = [statistics.mean(each[seed][metric] for seed in seeds) for each in (first, second)]
    return means[0] / means[1], len(seeds)


def at_most(limit: float, metric: str, one: tuple[str, str], two: tuple[str, str]) -> Callable[[Rows, str], Outcome]:
    """Returns a goal: the ratio of a metric is at most `limit`."""

    def check(rows: Rows, model: str) -> Outcome:
        result = ratio(rows, model, metric, one, two)
        return None if result is None else (f"{result[0]:.2f} ({result[1]})", result[0] <= limit)

    return check


def below_published(bits: str, label: str = "default") -> Callable[[Rows, str], Outcome]:
    """Returns a goal: the final distance is at most 0.7 of that of the best published recipe at W4A8."""

    def check(rows: Rows, model: str) -> Outcome:
        results = [ratio(rows, model, "final", (bits, label), ("w4a8", published)) for published in PUBLISHED]
        known = [
            (result, published) for result, published in zip(results, PUBLISHED, strict=True) if result is not None
        ]
        if not known:
            return None
        (value, seeds), published = max(known)
        return f"{value:.2f} of {published.split(',')[0]} ({seeds})", value <= 0.7

    return check


def inside_spread(bits: str, metric: str, better: int) -> Callable[[Rows, str], Outcome]:
    """Returns a goal: the mean of a metric is within a standard deviation of full precision with the same seeds.

    Args:
        bits: The bit width.
        metric: The metric.
        better: -1 where lower values are better, else 1.
    """

    def check(rows: Rows, model: str) -> Outcome:
        exact, quantized = rows.get((model, "", "full precision"), {}), rows.get((model, bits, "default"), {})
        seeds = [seed for seed in quantized if metric in exact.get(seed, {}) and metric in quantized[seed]]
        if len(exact) < 2 or not seeds:
            return None
        spread = statistics.stdev(row[metric] for row in exact.values())
        means = [statistics.mean(each[seed][metric] for seed in seeds) for each in (quantized, exact)]
        return f"{means[0]:.4g}, full {means[1]:.4g} ± {spread:.2g} ({len(seeds)})", better * (
            means[0] - means[1]
        ) >= -spread

    return check


def within_points(bits: str, points: float) -> Callable[[Rows, str], Outcome]:
    """Returns a goal: the share of names that rank first is at most some points below that of full precision."""

    def check(rows: Rows, model: str) -> Outcome:
        exact, quantized = rows.get((model, "", "full precision"), {}), rows.get((model, bits, "default"), {})
        seeds = [seed for seed in quantized if "top1" in exact.get(seed, {})]
        if not seeds:
            return None
        lost = 100 * statistics.mean(exact[seed]["top1"] - quantized[seed]["top1"] for seed in seeds)
        return f"{lost:.1f} points ({len(seeds)})", lost <= points

    return check


W4A8, BEFORE = ("w4a8", "default"), ("w4a8", "before")
GOALS: dict[str, Callable[[Rows, str], Outcome]] = {
    "W4A8: deployed losses at most 0.5 of version 0.1": at_most(0.5, "hard", W4A8, BEFORE),
    "W4A8: one-step error at most 0.7 of version 0.1": at_most(0.7, "one_step", W4A8, BEFORE),
    "W4A8: final distance at most 0.75 of version 0.1": at_most(0.75, "final", W4A8, BEFORE),
    "the same with inputs in floating point: one step": at_most(
        0.7, "one_step", ("w4a8", "default, float inputs"), BEFORE
    ),
    "the same with inputs in floating point: final": at_most(0.75, "final", ("w4a8", "default, float inputs"), BEFORE),
    "W4A8: final distance at most 0.7 of the best published recipe": below_published("w4a8"),
    "the same with inputs in floating point": below_published("w4a8", "default, float inputs"),
    "the same with `network-wise`": below_published("w4a8", "network-wise"),
    "the same with groups of 32 weights": below_published("w4g32a8"),
    "the same with a budget of 4.5 bits per weight": below_published("auto:4.5a8"),
    "the same with groups of 32 and inputs in floating point": below_published("w4g32a8", "default, float inputs"),
    "the same with groups of 32 and `thorough`, 300 iterations": below_published(
        "w4g32a8", "thorough, 300 iterations, gamma 0.2"
    ),
    "W3A8: final distance at most that of W4A8 of version 0.1": at_most(1.0, "final", ("w3a8", "default"), BEFORE),
    "the same in groups of 16 weights (3.25 bits)": at_most(1.0, "final", ("w3g16a8", "default"), BEFORE),
    "W8A8: Fréchet distance, emoji, inside the spread": inside_spread("w8a8", "frechet", -1),
    "W8A8: Fréchet distance, ImageNet, inside the spread": inside_spread("w8a8", "frechet_imagenet", -1),
    "W8A8: top 1 inside the spread": inside_spread("w8a8", "top1", 1),
    "W4A8: Fréchet distance, emoji, inside the spread": inside_spread("w4a8", "frechet", -1),
    "W4A8: Fréchet distance, ImageNet, inside the spread": inside_spread("w4a8", "frechet_imagenet", -1),
    "W4A8: top 1 inside the spread": inside_spread("w4a8", "top1", 1),
    "W4A4: Fréchet distance, emoji, at most 1.5 times full precision": at_most(
        1.5, "frechet", ("w4a4", "default"), ("", "full precision")
    ),
    "W4A4: Fréchet distance, ImageNet, at most 1.5 times full precision": at_most(
        1.5, "frechet_imagenet", ("w4a4", "default"), ("", "full precision")
    ),
    "W4A4: top 1 within 3 points": within_points("w4a4", 3),
}


def table(rows: Rows) -> str:
    """Returns one Markdown table with a line per goal that was measured."""
    models = sorted({model for model, _, _ in rows})
    lines = ["| goal for `default` | " + " | ".join(f"`{model}`" for model in models) + " | reached |"]
    lines.append("|---|" + "---|" * (len(models) + 1))
    for goal, check in GOALS.items():
        outcomes = [check(rows, model) for model in models]
        known = [outcome for outcome in outcomes if outcome is not None]
        if known:
            cells = ["" if outcome is None else outcome[0] for outcome in outcomes]
            lines.append(f"| {goal} | {' | '.join(cells)} | {sum(reached for _, reached in known)} of {len(known)} |")
    return "\n".join(lines)


def main() -> None:
    """Reads the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", type=Path, nargs="+", help="files of exported rows")
    print(table(read(parser.parse_args().places)))


if __name__ == "__main__":
    main()
