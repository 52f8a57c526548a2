"""Plots a selection: scores and counts over the sampler's steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from edadm_cli.artifacts import explained_os_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Mid-tones on a transparent background are readable on white and on dark pages.
_TEXT = "#7d8590"
_GRID = "#7d859040"
_DENSITY, _VARIETY, _COUNTS = "#2f81f7", "#db6d28", "#2da069"


def draw_selection(path: Path, title: str, timesteps: Tensor, density: Tensor, variety: Tensor, counts: Tensor) -> None:
    """Draws density and variety above the counts, each over the steps in the sampler's order.

    Args:
        path: PNG file to write.
        title: One line above the plot.
        timesteps: The scheduler's value at each step, with shape `(T,)`.
        density: Normalised density, with shape `(T,)`.
        variety: Normalised variety, with shape `(T,)`.
        counts: Samples per step, with shape `(T,)`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = range(len(counts))
    figure = Figure(figsize=(8, 4.6), dpi=160, layout="constrained")
    figure.patch.set_alpha(0)
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(steps, density.tolist(), color=_DENSITY, linewidth=2, label="density")
    above.plot(steps, variety.tolist(), color=_VARIETY, linewidth=2, label="variety")
    above.set_ylabel("score (min-max)", color=_TEXT)
    above.set_ylim(-0.05, 1.05)
    above.legend(frameon=False, labelcolor=_TEXT, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0)
    above.set_title(title, color=_TEXT, loc="left", fontsize=11)
    below.bar(steps, counts.tolist(), color=_COUNTS, width=0.8)
    below.set_ylabel("samples", color=_TEXT)
    below.set_xlabel("timestep, from noise to clean image", color=_TEXT)
    _label_steps(below, timesteps)
    for axes in (above, below):
        axes.patch.set_alpha(0)
        axes.grid(axis="y", color=_GRID)
        axes.set_axisbelow(True)
        axes.tick_params(colors=_TEXT)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(_TEXT)
    below.yaxis.get_major_locator().set_params(integer=True)
    with explained_os_errors(path):
        FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})


def _label_steps(axes: Axes, timesteps: Tensor) -> None:
    """Marks about ten steps with the scheduler's values."""
    marked = range(0, len(timesteps), max(1, len(timesteps) // 10))
    axes.set_xticks(list(marked), [f"{timesteps[step].item():g}" for step in marked])
