"""Compares pairs of rows seed by seed, with a verdict per pair, from rows of either study.

python benchmarks/learner_pairs.py docs/data/learner.jsonl docs/data/emoji.jsonl
python benchmarks/learner_pairs.py docs/data/learner.jsonl --bits w3a8 --sets samples

A cell is the mean over the seeds of the ratio of a metric to that of the other row with the same seed, with the
smallest and the largest in brackets. The verdict is on the row that is named first: `better` or `worse` if the ratio
is on the same side of 1 with every seed and its mean is at least two standard errors away from 1; otherwise it is
`within the spread`. Fewer than three seeds decide nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

METRICS = {"held_out": "held-out loss", "one_step": "one step", "guided": "guided", "final": "final"}
JUDGED = ("one_step", "final")
SEEDS, UNDECIDED = 3, "fewer than three seeds"
Pair = tuple[str, str, str]  # what is compared, the row, and the row beside it

CLAIMS: tuple[Pair, ...] = (
    ("learning blocks, against ranges alone", "default", "ranges-only"),
    ("EDA-DM against PTQ4DM", "paper", "ptq4dm"),
    ("EDA-DM against PTQ4DM", "paper, 300 iterations", "ptq4dm"),
    ("EDA-DM against Q-Diffusion", "paper", "q-diffusion, 2,500 iterations"),
    ("EDA-DM against Q-Diffusion", "paper, 300 iterations", "q-diffusion, 300 iterations"),
    ("TDAC against equal counts", "default", "uniform"),
    ("TDAC against equal counts", "paper, 300 iterations", "paper, uniform"),
    ("TDAC against equal counts, both without layer losses", "default, gamma 0", "uniform, gamma 0"),
    ("TDAC against the last steps", "default", "last"),
    ("TDAC against skewed normal counts", "default", "normal"),
    ("a local radius against the median", "default", "TDAC, median radius"),
    ("layer losses against none", "default", "default, gamma 0"),
    ("layer losses against none", "paper, 300 iterations", "paper, gamma 0"),
    ("layer losses against none, both with equal counts", "uniform", "uniform, gamma 0"),
    ("relative layer losses against absolute ones", "default", "gamma 0.8, absolute"),
    ("both halves of EDA-DM against neither", "default", "uniform, gamma 0"),
    ("both halves of EDA-DM against neither", "paper, 300 iterations", "paper, uniform, gamma 0"),
    ("rounding decided while learning", "paper, 300 iterations", "paper, tau 1 and regularizer 0"),
    ("QDrop", "QDrop", "default"),
    ("QDrop", "paper, 300 iterations", "paper, no QDrop"),
    ("quantized attention products", "quantized attention", "default"),
    ("symmetric ranges", "symmetric ranges", "default"),
)
SHIPPED: tuple[Pair, ...] = (
    ("`default` against version 0.1", "default", "before"),
    ("`default` against `paper`", "default", "paper"),
    ("`default` against `paper` with its iterations", "default", "paper, 300 iterations"),
    ("`default` against `q-diffusion`", "default", "q-diffusion, 2,500 iterations"),
    ("`default` against `q-diffusion`", "default", "q-diffusion, 300 iterations"),
    ("`default` against `ptq4dm`", "default", "ptq4dm"),
    ("inputs in floating point", "default, float inputs", "default"),
    ("`thorough` against `default`", "thorough", "default"),
    ("`thorough` with 300 iterations against `default`", "thorough, 300 iterations", "default"),
    ("inputs in floating point in `thorough`", "thorough", "thorough, all inputs quantized"),
)
AT_256 = {
    "uniform, gamma 0": "uniform, gamma 0",
    "TDAC, gamma 0": "default, gamma 0",
    "uniform, gamma 0.2, relative": "uniform",
}


def _of(samples: str, label: str) -> str:
    """Returns the label of a row with a number of samples; those of 256 are rows of other groups."""
    return AT_256.get(label, label) if samples == "256" else f"{label}, N {samples}"


SAMPLES: tuple[Pair, ...] = tuple(
    (f"{what}, N {samples}", _of(samples, row), _of(samples, "uniform, gamma 0"))
    for what, row in (
        ("TDAC against equal counts", "TDAC, gamma 0"),
        ("layer losses 0.2 against none", "uniform, gamma 0.2, relative"),
        ("layer losses 0.8, absolute, against none", "uniform, gamma 0.8, absolute"),
    )
    for samples in ("8", "32", "256", "1,024")
)
SETS = {"claims": CLAIMS, "shipped": SHIPPED, "samples": SAMPLES}


def ratios(rows: dict[tuple[str, str, int], dict[str, Any]], model: str, pair: Pair, metric: str) -> list[float]:
    """Returns the ratio of a metric for every seed that both rows of a pair have."""
    seeds = sorted(seed for name, label, seed in rows if name == model and label == pair[1])
    both = [(rows[model, pair[1], seed], rows.get((model, pair[2], seed), {})) for seed in seeds]
    return [one[metric] / two[metric] for one, two in both if one.get(metric) and two.get(metric)]


def verdict(values: Sequence[float]) -> str:
    """Returns what the ratios of all seeds say about the row that is named first; lower is better."""
    if len(values) < SEEDS:
        return UNDECIDED
    mean, error = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
    if max(values) < 1 and mean + 2 * error < 1:
        return "better"
    return "worse" if min(values) > 1 and mean - 2 * error > 1 else "within the spread"


def cell(values: Sequence[float]) -> str:
    """Returns the mean of the ratios, and their range where there are several."""
    if not values:
        return ""
    text = f"{statistics.mean(values):.3f}"
    return text if len(values) == 1 else f"{text} ({min(values):.3f} to {max(values):.3f})"


def table(all_rows: Sequence[dict[str, Any]], bits: str, pairs: Sequence[Pair]) -> str:
    """Returns one Markdown table of all pairs and models that have rows at a bit width."""
    rows = {(row["model"], row["label"], row["seed"]): row for row in all_rows if row["bits"] == bits}
    models = sorted({model for model, _, _ in rows})
    judged = [f"{METRICS[metric]} is" for metric in JUDGED]
    lines = ["| what | row | beside | model | seeds | " + " | ".join([*METRICS.values(), *judged]) + " |"]
    lines.append("|---|---|---|---|---|" + "---|" * (len(METRICS) + len(judged)))
    for pair in pairs:
        for model in models:
            values = {metric: ratios(rows, model, pair, metric) for metric in METRICS}
            if not values["one_step"]:
                continue
            cells = [cell(values[metric]) for metric in METRICS] + [verdict(values[metric]) for metric in JUDGED]
            what, one, two = pair
            lines.append(f"| {what} | {one} | {two} | `{model}` | {len(values['one_step'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(all_rows: Sequence[dict[str, Any]], bits: str, pairs: Sequence[Pair]) -> str:
    """Returns one Markdown table with a line per pair: ratios of the one-step error and of the final distance."""
    rows = {(row["model"], row["label"], row["seed"]): row for row in all_rows if row["bits"] == bits}
    models = sorted({model for model, _, _ in rows})
    lines = ["| claim | rows | " + " | ".join(f"`{model}`" for model in models) + " | verdict |"]
    lines.append("|---|---|" + "---|" * (len(models) + 1))
    for what, one, two in pairs:
        cells, outcomes = [], {}
        for model in models:
            both = [ratios(rows, model, (what, one, two), metric) for metric in JUDGED]
            cells.append(" / ".join(f"{statistics.mean(values):.2f}" for values in both if values))
            if len(both[0]) >= SEEDS:
                outcomes[model] = outcome([verdict(values) for values in both])
        if any(cells):
            lines.append(f"| {what} | {one}; {two} | {' | '.join(cells)} | {overall(outcomes)} |")
    return "\n".join(lines)


def outcome(verdicts: Sequence[str]) -> str:
    """Returns what the verdicts on the judged metrics of one model say together."""
    better, worse = "better" in verdicts, "worse" in verdicts
    if better and worse:
        return "better in one metric, worse in the other"
    return "better" if better else "worse" if worse else "no difference"


def overall(outcomes: dict[str, str]) -> str:
    """Returns the outcomes of all models with several seeds in words."""
    if not outcomes:
        return UNDECIDED
    grouped = {text: [f"`{model}`" for model, other in outcomes.items() if other == text] for text in outcomes.values()}
    return "; ".join(f"{text}: {', '.join(models)}" for text, models in grouped.items())


def main() -> None:
    """Reads the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", type=Path, nargs="+", help="files of exported rows")
    parser.add_argument("--bits", default="w4a8")
    parser.add_argument("--sets", default="shipped,claims", help=f"with commas, of {', '.join(SETS)}")
    parser.add_argument("--summary", action="store_true", help="one line per pair, with a verdict over all models")
    options = parser.parse_args()
    rows = [json.loads(line) for place in options.places for line in place.read_text(encoding="utf-8").splitlines()]
    pairs = [pair for name in options.sets.split(",") for pair in SETS[name]]
    print((summary if options.summary else table)(rows, options.bits, pairs))


if __name__ == "__main__":
    main()
