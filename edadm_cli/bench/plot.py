"""Plots the result of a bench: the time of each contender, the shortest at the top."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edadm_cli.artifacts import Contender

_COLOURS = {"float": "#9aa1ac", "integer": "#4338ca", "peer": "#c2570c"}
_LABELS = {"float": "full precision", "integer": "quantized here", "peer": "quantized by another tool"}


def draw_contenders(contenders: Sequence[Contender], peers: Sequence[str], title: str, path: Path) -> None:
    """Draws medians as bars, with the spread from the shortest to the longest call.

    Args:
        contenders: All contenders.
        peers: Names of the engines that are other tools.
        title: The title of the plot.
        path: The PNG file to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = sorted(contenders, key=lambda row: row.latency_ms.median, reverse=True)
    kinds = ["peer" if row.engine in peers else "float" if row.bits is None else "integer" for row in rows]
    figure = Figure(figsize=(8, 1.2 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    medians = [row.latency_ms.median for row in rows]
    below = [row.latency_ms.median - row.latency_ms.min for row in rows]
    above = [row.latency_ms.max - row.latency_ms.median for row in rows]
    places = range(len(rows))
    axes.barh(places, medians, xerr=(below, above), color=[_COLOURS[kind] for kind in kinds], ecolor="#5b616b")
    axes.set_yticks(places, [row.name for row in rows])
    for place, median in zip(places, medians, strict=True):
        axes.annotate(f" {median:.4g}", (0, place), va="center", color="white", fontsize=9)
    axes.set_xlabel("milliseconds per call: median, shortest and longest")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    shown = [kind for kind in _COLOURS if kind in kinds]
    axes.legend(handles=[Patch(color=_COLOURS[kind], label=_LABELS[kind]) for kind in shown], frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})
