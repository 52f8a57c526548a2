"""Plots as inline SVG; their colours are the page's CSS variables and follow the light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edadm_cli.report.formats import number, power_of_ten
from edadm_cli.report.html import Html, element

_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 14.0, 14.0, 42.0
_MAX_LABELS = 6


@dataclass(frozen=True)
class Frame:
    """The area inside the axes of a plot, with the positions of values in it.

    Args:
        width: Width of the whole plot, in user units.
        height: Its height.
        low: Value at the lower edge.
        high: Value at the upper edge.
        logarithmic: Whether the vertical axis is.
    """

    width: float
    height: float
    low: float
    high: float
    logarithmic: bool = False

    def x(self, index: float, count: int) -> float:
        """Returns the horizontal position of the middle of one of `count` equal columns."""
        return _LEFT + (index + 0.5) * (self.width - _LEFT - _RIGHT) / count

    def y(self, value: float) -> float:
        """Returns the vertical position of a value; a value below the axis is drawn on it."""
        measure: Callable[[float], float] = math.log10 if self.logarithmic else float
        low, high = measure(self.low), measure(self.high)
        share = (measure(max(value, self.low)) - low) / (high - low)
        return _TOP + (1 - share) * (self.height - _TOP - _BOTTOM)

    @property
    def bottom(self) -> float:
        """Vertical position of the horizontal axis."""
        return self.height - _BOTTOM


def score_plot(timesteps: Sequence[float], density: Sequence[float], variety: Sequence[float]) -> Html:
    """Draws density and variety over the sampler's steps."""
    frame = Frame(460, 250, 0.0, 1.0)
    lines = [_line(frame, values, name) for name, values in (("density", density), ("variety", variety))]
    label = f"Density and variety at each of {len(timesteps)} steps, scaled to between 0 and 1."
    return _picture(frame, label, _grid(frame, [0.0, 0.5, 1.0]), _steps(frame, timesteps), *lines)


def counts_plot(timesteps: Sequence[float], counts: Sequence[int]) -> Html:
    """Draws the number of samples of each of the sampler's steps."""
    ticks = linear_ticks(max([*counts, 1]))
    frame = Frame(460, 250, 0.0, ticks[-1])
    width = 0.72 * (frame.width - _LEFT - _RIGHT) / len(counts)
    bars = []
    for index, (timestep, count) in enumerate(zip(timesteps, counts, strict=True)):
        top = frame.y(count)
        title = element("title", f"timestep {timestep:g}: {count}")
        left = _place(frame.x(index, len(counts)) - width / 2)
        height = _place(frame.bottom - top)
        bars.append(
            element("rect", title, x=left, y=_place(top), width=_place(width), height=height, rx=1.5, class_="counts")
        )
    label = f"Samples taken at each of {len(counts)} steps, from {min(counts)} to {max(counts)}."
    return _picture(frame, label, _grid(frame, ticks), _steps(frame, timesteps), *bars)


def loss_plot(names: Sequence[str], before: Sequence[float], after: Sequence[float]) -> Html:
    """Draws each unit's reconstruction loss before and after learning, on a logarithmic axis."""
    ticks = decades([*before, *after])
    frame = Frame(940, 330, ticks[0], ticks[-1], logarithmic=True)
    radius = min(5.0, max(2.0, 0.3 * (frame.width - _LEFT - _RIGHT) / len(names)))
    marks = []
    for index, (name, first, last) in enumerate(zip(names, before, after, strict=True)):
        x, y1, y2 = _place(frame.x(index, len(names))), _place(frame.y(first)), _place(frame.y(last))
        title = element("title", f"{name}: {number(first)} before, {number(last)} after")
        stem = element("line", x1=x, x2=x, y1=y1, y2=y2, class_="stem")
        hollow = element("circle", cx=x, cy=y1, r=radius, class_="before")
        solid = element("circle", cx=x, cy=y2, r=radius, class_="after")
        marks.append(element("g", title, stem, hollow, solid))
    label = f"Reconstruction loss of {len(names)} units before and after learning, logarithmic."
    return _picture(frame, label, _grid(frame, ticks), _caption(frame, "units, in the order of execution"), *marks)


def curve_plot(values: Sequence[float], label: str) -> Html:
    """Draws a loss curve as a small line without axes, on a logarithmic scale."""
    width, height, edge = 132.0, 30.0, 3.0
    smallest = min((value for value in values if value > 0), default=1.0)
    logs = [math.log10(max(value, smallest)) for value in values]
    low, span = min(logs), (max(logs) - min(logs)) or 1.0
    across = (width - 2 * edge) / max(len(logs) - 1, 1)
    points = [
        (edge + index * across, height - edge - (value - low) / span * (height - 2 * edge))
        for index, value in enumerate(logs)
    ]
    line = element("polyline", points=_points(points), class_="after")
    return element("svg", line, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=label, class_="curve")


def bar(share: float, kind: str) -> Html:
    """Draws a horizontal bar that fills a share of its cell; the number stands beside it."""
    filled = element("rect", width=_place(100 * share), height=10, rx=0.6, class_=kind)
    return element("svg", filled, viewBox="0 0 100 10", preserveAspectRatio="none", aria_hidden="true", class_="bar")


def linear_ticks(largest: float) -> list[float]:
    """Returns three to six round values from zero to at least the largest value."""
    unit = 10.0 ** math.floor(math.log10(largest))
    step = next(unit * f for f in (0.2, 0.5, 1.0, 2.0) if 5 * unit * f >= largest)
    step = max(step, 1.0)
    return [step * index for index in range(math.ceil(largest / step) + 1)]


def decades(values: Sequence[float]) -> list[float]:
    """Returns the powers of ten around the values, at least two; values that are not positive are ignored."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    return [10.0**exponent for exponent in range(low, max(high, low + 1) + 1)]


def _picture(frame: Frame, label: str, *content: Html) -> Html:
    return element(
        "svg", *content, viewBox=f"0 0 {frame.width:g} {frame.height:g}", role="img", aria_label=label, class_="plot"
    )


def _line(frame: Frame, values: Sequence[float], kind: str) -> Html:
    points = [(frame.x(index, len(values)), frame.y(value)) for index, value in enumerate(values)]
    dots = [element("circle", cx=_place(x), cy=_place(y), r=2.2, class_=kind) for x, y in points]
    return element("g", element("polyline", points=_points(points), class_=kind), *dots)


def _grid(frame: Frame, ticks: Sequence[float]) -> Html:
    lines = []
    for index, tick in enumerate(ticks):
        y = frame.y(tick)
        lines.append(
            element(
                "line",
                x1=_LEFT,
                x2=frame.width - _RIGHT,
                y1=_place(y),
                y2=_place(y),
                class_="axis" if index == 0 else "grid",
            )
        )
        text = power_of_ten(tick) if frame.logarithmic else f"{tick:g}"
        lines.append(element("text", text, x=_LEFT - 8, y=_place(y + 4), text_anchor="end"))
    return element("g", *lines)


def _steps(frame: Frame, timesteps: Sequence[float]) -> Html:
    """Marks a few steps with the scheduler's values."""
    every = math.ceil(len(timesteps) / _MAX_LABELS)
    labels = [
        element(
            "text",
            f"{timesteps[index]:g}",
            x=_place(frame.x(index, len(timesteps))),
            y=frame.bottom + 17,
            text_anchor="middle",
        )
        for index in range(0, len(timesteps), every)
    ]
    return element("g", *labels, _caption(frame, "timestep, from noise to image"))


def _caption(frame: Frame, text: str) -> Html:
    middle = (_LEFT + frame.width - _RIGHT) / 2
    return element("text", text, x=_place(middle), y=frame.height - 6, text_anchor="middle", class_="caption")


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{_place(x)},{_place(y)}" for x, y in points)


def _place(value: float) -> str:
    """Returns a coordinate as a short text that is the same on every machine."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
