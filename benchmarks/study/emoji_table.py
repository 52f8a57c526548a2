"""Prints the tables of `benchmarks/emoji.py`, and writes its rows with only their metrics."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from learner_table import narrowness

from study.emoji_rows import KEYS, VARIANTS

METRICS = {
    "one_step": "one step",
    "guided": "guided",
    "held_out": "held-out loss",
    "final": "relative L2",
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
    latest = {tuple(result[key] for key in KEYS): result for result in results}
    for _, result in sorted(latest.items()):
        if "loss" in result:
            result = {"hard": result["loss"]["last"], **result}
        shown = (*KEYS, "card", "images", "counts", "hard", *METRICS, "coherence")
        row = {key: result[key] for key in shown if result.get(key) is not None}
        lines.append(json.dumps({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def table(results: list[dict[str, Any]]) -> str:
    """Returns means over the seeds and sample standard deviations as Markdown, one table per model.

    A column names the number of pictures if it is not the same for all rows.
    """
    pictured = len({result["images"] for result in results}) > 1
    groups: dict[str, dict[tuple[str, str], list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        groups[result["model"]][result["bits"], result["label"]].append(result)
    order = ["full precision", *VARIANTS]

    def place(label: str) -> int:
        return order.index(label) if label in order else len(order)

    lines: list[str] = []
    for model, rows in sorted(groups.items(), reverse=True):
        lines += [
            "",
            f"### {model}",
            "",
            "| bits | recipe | seeds | " + "pictures | " * pictured + " | ".join(METRICS.values()) + " |",
        ]
        lines.append("|---|---|---|" + "---|" * (pictured + len(METRICS)))
        for bits, label in sorted(rows, key=lambda row: (_narrowness(row[0]), place(row[1]))):
            seeds = rows[bits, label]
            cells = [_cell([seed[key] for seed in seeds if key in seed]) for key in METRICS]
            pictures = " and ".join(sorted({f"{seed['images']:,}" for seed in seeds}))
            start = f"| {bits} | {label} | {len(seeds)} | " + f"{pictures} | " * pictured
            lines.append(start + " | ".join(cells) + " |")
    return "\n".join(lines)


def _narrowness(bits: str) -> tuple[float, float]:
    """Returns a key that sorts full precision first, then wide activations, and among them wide weights."""
    return narrowness(bits) if bits else (-32.0, -32.0)


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{spread}"
