"""Holds back some trajectories, on which the result of learning all units together is judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

SHARE = 1 / 8
"""Of the trajectories: as many are held back."""
_FEWEST = 16  # trajectories of which some are held back
_MOST_ROWS = 1024  # that are compared: it happens again and again


@dataclass(frozen=True)
class RowSplit:
    """Which rows are learned from, and with which the loss is compared before, during and after learning.

    A denoiser of many weights can learn its trajectories by heart: its error on them falls, while that on others
    rises. So the rows of some trajectories are held back. With few trajectories all rows are both.

    Attributes:
        learned: The numbers of the rows that are learned from.
        compared: The numbers of the rows with which losses are compared.
    """

    learned: Sequence[int]
    compared: Sequence[int]

    @property
    def holds_back(self) -> bool:
        """Returns whether there are rows that are compared and not learned from."""
        return self.learned != self.compared

    @classmethod
    def of(cls, trajectories: Sequence[int]) -> Self:
        """Holds back the last trajectories.

        Args:
            trajectories: The number of the trajectory of each row.
        """
        rows, distinct = range(len(trajectories)), sorted(set(trajectories))
        if len(distinct) < _FEWEST:
            return cls(rows, rows)
        first = distinct[-round(SHARE * len(distinct))]
        held_back = [row for row in rows if trajectories[row] >= first]
        every = -(-len(held_back) // _MOST_ROWS)
        return cls([row for row in rows if trajectories[row] < first], held_back[::every])
