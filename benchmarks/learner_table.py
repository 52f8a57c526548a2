"""Prints tables of the study of the learner, from its results or from the compact rows in docs/data/learner.jsonl.

python benchmarks/learner_table.py docs/data/learner.jsonl --bits w4a8 --groups ladder
python benchmarks/learner_table.py studies/learner --export docs/data/learner.jsonl
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from study.learner_variants import GROUPS

METRICS = ("undecided", "first", "soft", "hard", "held_out", "one_step", "guided", "bias", "coherence", "final")
BASELINE = "before"
HEADINGS = {
    "held_out": "loss of the units",
    "one_step": "error of one step's prediction",
    "final": "distance of the final samples",
}
_KEYS = ("model", "bits", "label", "seed", *METRICS, "card")
_DIGITS = 5

Row = dict[str, Any]


def read_rows(places: Iterable[Path]) -> list[Row]:
    """Returns the rows of result folders and of files of compact rows; of several of one job the last."""
    rows: dict[tuple[str, str, str, int], Row] = {}
    for place in places:
        if place.is_dir():
            texts = [path.read_text(encoding="utf-8") for path in sorted((place / "results").rglob("*.json"))]
        else:
            texts = place.read_text(encoding="utf-8").splitlines()
        for row in map(json.loads, texts):
            rows[row["model"], row["bits"], row["label"], row["seed"]] = row
    return list(rows.values())


def listed(text: str) -> list[str]:
    """Returns the names of a list with commas; a comma before a space belongs to a name such as `emoji-sd, PNDM`."""
    return re.split(r",(?! )", text)


def export(rows: Sequence[Row], path: Path) -> None:
    """Writes the rows with their metrics alone, one JSON object per line, in a fixed order."""
    lines = []
    for row in sorted(rows, key=lambda row: tuple(row[key] for key in _KEYS[:4])):
        values = {key: row[key] for key in _KEYS if row.get(key) is not None}
        lines.append(
            json.dumps({k: float(f"{v:.{_DIGITS}g}") if isinstance(v, float) else v for k, v in values.items()})
        )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def table(rows: Sequence[Row], columns: Sequence[str] = METRICS, labels: Sequence[str] = ()) -> str:
    """Returns means over the seeds and sample standard deviations as Markdown, one table per model and bit width.

    `ratio one_step` and `ratio final` are means relative to those of the variant `before` at the same bit width, over
    the seeds that both have.

    Args:
        rows: The results.
        columns: The columns of the table.
        labels: The variants that are shown, in this order; without any, all.
    """
    tables: dict[tuple[str, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if not labels or row["label"] in labels:
            tables[row["model"], row["bits"]][row["label"]].append(row)
    order = list(labels) or [label for group in GROUPS.values() for label in group.variants]
    lines: list[str] = []
    for (model, bits), variants in sorted(tables.items()):
        baseline = [row for row in rows if (row["model"], row["bits"], row["label"]) == (model, bits, BASELINE)]
        lines += ["", f"### {model} {bits}", "", "| variant | seeds | " + " | ".join(columns) + " |"]
        lines.append("|---|---|" + "---|" * len(columns))
        for label in sorted(variants, key=lambda label: order.index(label) if label in order else len(order)):
            cells = [_cell(name, variants[label], baseline) for name in columns]
            lines.append(f"| {label} | {len(variants[label])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def widths(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Returns one Markdown table per model with a line per bit width and variant, wide widths first.

    Args:
        rows: The results.
        columns: The metrics: means over the seeds and sample standard deviations.
    """
    labels = [label for group in GROUPS.values() for label in group.variants]
    places = {label: labels.index(label) for label in labels}
    lines: list[str] = []
    for model in sorted({row["model"] for row in rows}):
        groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
        for row in rows:
            if row["model"] == model:
                groups[row["bits"], row["label"]].append(row)
        lines += ["", f"### {model}", "", "| bits | variant | seeds | " + " | ".join(columns) + " |"]
        lines.append("|---|---|---|" + "---|" * len(columns))
        for bits, label in sorted(groups, key=lambda key: (narrowness(key[0]), places.get(key[1], len(places)))):
            cells = [_cell(name, groups[bits, label], []) for name in columns]
            lines.append(f"| {bits} | {label} | {len(groups[bits, label])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def narrowness(bits: str) -> tuple[float, float]:
    """Returns a key that sorts wide activations first, and among them wide weights."""
    weight, *group_size, activation = re.findall(r"[0-9.]+", bits)
    per_weight = float(weight)
    if not bits.startswith("auto:"):  # an average includes the multipliers of groups, which have four bits each
        per_weight += sum(4 / int(size) for size in group_size)
    return -float(activation), -per_weight


def across(rows: Sequence[Row], columns: Sequence[str], metrics: Sequence[str]) -> str:
    """Returns one Markdown table with a line per model and metric, and a column per variant: means over the seeds.

    A cell with a single seed is left empty, since means of other seeds stand beside it. A single metric is not named.

    Args:
        rows: The results, of one bit width.
        columns: The variants; `paper|paper, 300 iterations` is the first of these that a model has.
        metrics: The metrics.
    """
    names = [column.split("|") for column in columns]
    lines = ["| | " + " | ".join(f"`{first}`" for first, *_ in names) + " |", "|---|" + "---|" * len(names)]
    for model in sorted({row["model"] for row in rows}):
        for metric in metrics:
            cells = []
            for labels in names:
                choices = [[row for row in rows if (row["model"], row["label"]) == (model, label)] for label in labels]
                cells.append(
                    _cell(metric, next((each for each in choices if len(each) > 1), []), []).partition(" ±")[0]
                )
            heading = f": {HEADINGS.get(metric, metric)}" if len(metrics) > 1 else ""
            lines.append(f"| `{model}`{heading} | {' | '.join(cells)} |")
    return "\n".join(lines)


def across_widths(rows: Sequence[Row], metric: str) -> str:
    """Returns one Markdown table with a line per model and a column per bit width: means, and the number of seeds.

    Args:
        rows: The results of one variant.
        metric: The metric.
    """
    widths = sorted({row["bits"] for row in rows}, key=narrowness)
    lines = ["| | " + " | ".join(widths) + " |", "|---|" + "---|" * len(widths)]
    for model in sorted({row["model"] for row in rows}):
        values = [[row[metric] for row in rows if (row["model"], row["bits"]) == (model, bits)] for bits in widths]
        cells = [f"{statistics.mean(seeds):.3g} ({len(seeds)})" if seeds else "" for seeds in values]
        lines.append(f"| `{model}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(name: str, rows: Sequence[Row], baseline: Sequence[Row]) -> str:
    kind, _, metric = name.rpartition(" ")
    if kind == "ratio":
        seeds = {row["seed"] for row in rows} & {row["seed"] for row in baseline}
        pair = [[row[metric] for row in group if row["seed"] in seeds] for group in (rows, baseline)]
        return f"{statistics.mean(pair[0]) / statistics.mean(pair[1]):.2f}" if seeds else ""
    if name == "card":
        return " and ".join(sorted({row.get("card", "") for row in rows}))
    values = [row[name] for row in rows if row.get(name) is not None]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{spread}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", type=Path, nargs="+", help="OUT of benchmarks/learner.py, or files of compact rows")
    parser.add_argument("--groups", help="groups of variants that are shown, in this order; by default all")
    parser.add_argument("--bits", help="bit widths that are shown, with commas; by default all")
    parser.add_argument("--models", help="models that are shown, with commas; by default all")
    parser.add_argument("--columns", default=",".join(METRICS), help="such as 'one_step,ratio one_step,final'")
    parser.add_argument("--across", help="variants with semicolons, which become the columns of one table of means")
    parser.add_argument("--across-widths", help="a variant: its bit widths become the columns of one table of means")
    parser.add_argument("--widths", action="store_true", help="one table per model with all bit widths")
    parser.add_argument("--export", type=Path, help="write the rows with their metrics alone to this file")
    options = parser.parse_args()
    rows = read_rows(options.places)
    if options.export is not None:
        export(rows, options.export)
    for key, text in (("bits", options.bits), ("model", options.models)):
        rows = [row for row in rows if text is None or row[key] in listed(text)]
    if options.across is not None:
        print(across(rows, options.across.split(";"), options.columns.split(",")))
        return
    if options.across_widths is not None:
        print(across_widths([row for row in rows if row["label"] == options.across_widths], options.columns))
        return
    if options.widths:
        print(widths(rows, options.columns.split(",")))
        return
    labels = [label for name in (options.groups or "").split(",") if name for label in GROUPS[name].variants]
    print(table(rows, options.columns.split(","), labels))


if __name__ == "__main__":
    main()
