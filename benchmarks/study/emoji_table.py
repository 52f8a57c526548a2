"""Prints the tables of `benchmarks/emoji.py`, and writes its rows with only their metrics."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from learner_table import narrowness

from study import emoji_steps
from study.emoji_rows import FULL_PRECISION, KEYS, VARIANTS

METRICS = {
    "one_step": "one step",
    "guided": "guided",
    "held_out": "held-out loss",
    "final": "relative L2",
    "final_new": "relative L2, new prompts",
    "ssim": "SSIM",
    "perceptual_imagenet": "perceptual, ImageNet",
    "frechet": "Fréchet, emoji",
    "frechet_imagenet": "Fréchet, ImageNet",
    "top1": "top 1",
    "top5": "top 5",
}


def read_results(out: Path) -> list[dict[str, Any]]:
    """Returns the finished rows."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "results").glob("*.json"))]


def export(results: list[dict[str, Any]], path: Path) -> None:
    """Writes the latest row of each kind with only its metrics, one JSON object per line, in a fixed order."""
    lines = []
    latest = {(*(result[key] for key in KEYS), result["images"]): result for result in results}
    for _, result in sorted(latest.items()):
        if "loss" in result:
            result = {"hard": result["loss"]["last"], **result}
        shown = (*KEYS, "card", "images", "counts", "hard", *METRICS, "coherence", "steps")
        row = {key: result[key] for key in shown if result.get(key) is not None}
        if (result["label"], result["bits"]) == (emoji_steps.LABEL, emoji_steps.BITS) and "one_step_by_step" in result:
            row["steps"] = [float(f"{error:.3g}") for error in result["one_step_by_step"]]
        lines.append(json.dumps({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def table(results: list[dict[str, Any]]) -> str:
    """Returns means over the seeds and sample standard deviations as Markdown, one table per model.

    A sentence says how many pictures the rows of a model have, or a column where they differ. Metrics that no row of a
    model has are left out.
    """
    models = sorted({result["model"] for result in results}, reverse=True)
    return "\n".join(_table_of(model, [result for result in results if result["model"] == model]) for model in models)


def _table_of(model: str, results: list[dict[str, Any]]) -> str:
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        groups[result["bits"], result["label"], result["images"]].append(result)
    numbers = sorted({images for _, _, images in groups})
    metrics = {key: name for key, name in METRICS.items() if any(key in result for result in results)}
    column = ["pictures"] if len(numbers) > 1 else []
    names = ["bits", "recipe", "seeds", *column, *metrics.values()]
    lines = ["", f"### {model}", ""]
    lines += [] if column else [f"Each row has {numbers[0]:,} pictures per seed.", ""]
    lines += [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for bits, label, images in sorted(groups, key=_place):
        seeds = groups[bits, label, images]
        facts = [bits, label, f"{len(seeds)}", *(f"{images:,}" for _ in column)]
        cells = [_cell([seed[key] for seed in seeds if key in seed]) for key in metrics]
        lines.append(f"| {' | '.join([*facts, *cells])} |")
    return "\n".join(lines)


def _place(group: tuple[str, str, int]) -> tuple[tuple[float, float], int, int]:
    """Returns a key that sorts by bits, and then in the order of the variants; unknown labels come last."""
    bits, label, images = group
    order = [FULL_PRECISION, *VARIANTS]
    return _narrowness(bits), order.index(label) if label in order else len(order), images


def _narrowness(bits: str) -> tuple[float, float]:
    """Returns a key that sorts full precision first, then wide activations, and among them wide weights."""
    return narrowness(bits) if bits else (-32.0, -32.0)


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{spread}"
