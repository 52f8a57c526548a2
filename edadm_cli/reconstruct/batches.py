"""The calibration set in batches, as a reconstruction sends it through the denoiser."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from edadm_cli.models.calibration import CalibrationSet


class Batches:
    """The calibration set in batches, fed to a denoiser.

    Rows are numbered batch by batch: within one, those of the unconditional branch come first.
    """

    def __init__(
        self, calibration: CalibrationSet, batch_size: int, device: torch.device, num_samples: int | None = None
    ) -> None:
        self.calibration, self.batch_size, self.device = calibration, batch_size, device
        self.num_samples = len(calibration) if num_samples is None else num_samples

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    @property
    def num_rows(self) -> int:
        """Rows of the whole set."""
        return self.num_samples * self.calibration.branches

    def few(self, rows: int) -> Batches:
        """Returns the first samples in one batch of about `rows` rows; of one branch, where two are too many rows."""
        branches = min(rows, self.calibration.branches)
        samples = max(1, min(rows // branches, self.batch_size, self.num_samples))
        return Batches(replace(self.calibration, branches=branches), samples, self.device, samples)

    def indices(self) -> list[list[int]]:
        """Returns the samples of each batch."""
        starts = range(0, self.num_samples, self.batch_size)
        return [list(range(start, min(start + self.batch_size, self.num_samples))) for start in starts]

    def rows(self, indices: Sequence[int]) -> list[int]:
        """Returns the numbers of the rows of some samples, in the order in which the denoiser gets them."""
        found = []
        for branch in range(self.calibration.branches):
            for index in indices:
                start = index - index % self.batch_size
                size = min(self.batch_size, self.num_samples - start)
                found.append(start * self.calibration.branches + branch * size + index - start)
        return found

    def call(self, indices: Sequence[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments of the denoiser for some samples."""
        return self.calibration.call(indices, self.device, torch.float32)

    def __iter__(self) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        return (self.call(indices) for indices in self.indices())
