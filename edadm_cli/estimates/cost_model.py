r"""The cost model: predicts the time of a kind of work on any unit, from measurements on a few units.

    seconds = ratio * sum over i of c_i * size_i,   c_i >= 0

The sizes are the seconds of the unit's full-precision forward (which grow with the rows), its weights and its layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Measure = Literal["forward", "weights", "layers"]

_SAME = 1e-9  # share of the squared seconds by which a fit must be better than one with fewer or earlier measures


@dataclass(frozen=True)
class Size:
    """The sizes of a unit that the time of work on it may depend on.

    Attributes:
        kind: The kind of the unit; the same work takes similar time on units of one kind.
        forward: Seconds of its full-precision forward per row.
        weights: Number of its weights.
        layers: Number of its layers.
    """

    kind: str
    forward: float
    weights: int
    layers: int

    def of(self, measure: Measure, rows: float) -> float:
        """Returns the value of `measure` for a call of `rows` rows."""
        return {"forward": self.forward * rows, "weights": self.weights, "layers": self.layers}[measure]


class CostFit:
    """Predicts the seconds of one kind of work, by a fit to measurements.

    A unit that was measured has its own ratio to the fit. Any other unit has the ratio of its kind, else 1.

    Args:
        sizes: The sizes of all units, by name.
        measured: Rows and seconds of a call of at least one unit, by name.
        measures: The sizes that the work may depend on; the first ones are preferred if the measurements do not
            separate them.
    """

    def __init__(
        self, sizes: Mapping[str, Size], measured: Mapping[str, tuple[int, float]], measures: Sequence[Measure]
    ) -> None:
        self._sizes = sizes
        table = [[sizes[name].of(measure, rows) for measure in measures] for name, (rows, _) in measured.items()]
        seconds = {name: spent for name, (_, spent) in measured.items()}
        fit = _fit(np.array(table, float), np.array([*seconds.values()]))
        self._coefficients = dict(zip(measures, fit, strict=True))
        fitted = {name: self._fitted(name, rows) for name, (rows, _) in measured.items()}
        groups = {name: [name] for name in measured}
        for name in measured:
            groups.setdefault(sizes[name].kind, []).append(name)
        self._ratios = {
            group: sum(seconds[name] for name in names) / total if (total := sum(fitted[n] for n in names)) else 1.0
            for group, names in groups.items()
        }

    def seconds(self, name: str, rows: float = 1) -> float:
        """Returns the estimated seconds of one call of unit `name` with `rows` rows."""
        ratio = self._ratios.get(name, self._ratios.get(self._sizes[name].kind, 1.0))
        return ratio * self._fitted(name, rows)

    def _fitted(self, name: str, rows: float) -> float:
        return sum(each * self._sizes[name].of(measure, rows) for measure, each in self._coefficients.items())


def _fit(table: np.ndarray, seconds: np.ndarray) -> list[float]:
    """Returns the non-negative coefficients of least squares, from the choice of columns that fits best.

    Errors are weighted by the inverse root of the seconds, a compromise between absolute and relative errors.
    """
    samples, columns = table.shape
    scale = 1 / np.sqrt(np.maximum(seconds, 1e-9))
    table, targets = table * scale[:, None], seconds * scale
    best, least = np.zeros(columns), np.inf
    for count in range(1, min(samples, columns) + 1):
        for chosen in itertools.combinations(range(columns), count):
            fit = np.linalg.lstsq(table[:, chosen], targets)[0]
            error = float(np.square(table[:, chosen] @ fit - targets).sum())
            if (fit >= 0).all() and error < least - _SAME * float(np.square(targets).sum()):
                best, least = np.zeros(columns), error
                best[list(chosen)] = fit
    return [float(each) for each in best]
