"""Plots a sensitivity measurement: the layers with the largest errors, at each number of weight bits."""

from __future__ import annotations

from pathlib import Path

from edadm_cli.artifacts import Sensitivity, explained_os_errors

_TEXT, _GRID = "#7d8590", "#7d859040"
_COLOURS = ("#d1242f", "#db6d28", "#bf8700", "#2da069", "#2f81f7", "#8250df", "#57606a")
NUM_SHOWN = 24


def plot_sensitivity(path: Path, result: Sensitivity) -> None:
    """Plots the relative L2 that the most sensitive layers cause alone, one dot per number of weight bits.

    Args:
        path: PNG file to write.
        result: The measurement.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lowest = min(bits for layer in result.layers for bits in layer.weight_errors)
    layers = result.ranked(lowest)[:NUM_SHOWN][::-1]
    figure = Figure(figsize=(8, 1.2 + 0.24 * len(layers)), dpi=160, layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    all_bits = sorted({bits for layer in layers for bits in layer.weight_errors})
    for colour, bits in zip(_COLOURS, all_bits, strict=False):
        rows = [row for row, layer in enumerate(layers) if layer.weight_errors.get(bits)]
        distances = [layers[row].weight_errors[bits] ** 0.5 for row in rows]
        axes.scatter(distances, rows, color=colour, s=18, label=f"{bits} bits", zorder=2)
    axes.set_xscale("log")
    axes.set_yticks(range(len(layers)), [layer.name for layer in layers], fontsize=7)
    axes.set_xlabel("relative L2 of the final sample that the layer alone causes (predicted)", color=_TEXT)
    axes.set_title(f"The {len(layers)} most sensitive layers, by bits of their weights", color=_TEXT, loc="left")
    axes.legend(frameon=False, labelcolor=_TEXT, loc="lower right", fontsize=8)
    axes.grid(axis="x", color=_GRID)
    axes.patch.set_alpha(0)
    axes.tick_params(colors=_TEXT)
    for spine in axes.spines.values():
        spine.set_color(_TEXT)
    with explained_os_errors(path):
        FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})
