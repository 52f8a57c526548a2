"""Divides the calibration set into batches, which a reconstruction passes through the denoiser."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from edadm_cli.models.denoiser_calls.calibration import CalibrationSet
from edadm_cli.models.denoiser_calls.calls import flat_tensors
from edadm_cli.models.families import Call

_HELD_BYTES = {"cuda": 2**30}  # by type of device: calls that stay on it, so that passes do not copy them again


class Batches:
    """The calibration set, divided into batches of denoiser calls.

    Rows are numbered batch by batch. Within a batch the rows of the unconditional branch come first. If the calls of
    all batches together are small, they stay on a GPU: there is a pass per unit, and many passes compute little.

    Args:
        calibration: The calibration set.
        batch_size: Samples per call of the denoiser.
        device: The device of the calls.
        num_samples: Number of samples that are used; by default all.
    """

    def __init__(
        self, calibration: CalibrationSet, batch_size: int, device: torch.device, num_samples: int | None = None
    ) -> None:
        self.calibration, self.batch_size, self.device = calibration, batch_size, device
        self.num_samples = len(calibration) if num_samples is None else num_samples
        self._held: dict[tuple[int, ...], tuple[Call, int]] = {}  # with the number of writes into it

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    @property
    def num_rows(self) -> int:
        """Number of rows of the whole set: samples times guidance branches."""
        return self.num_samples * self.calibration.branches

    def few(self, rows: int) -> Batches:
        """Returns one batch of the first samples with about `rows` rows; with one branch if two have too many rows."""
        branches = min(rows, self.calibration.branches)
        samples = max(1, min(rows // branches, self.batch_size, self.num_samples))
        return Batches(replace(self.calibration, branches=branches), samples, self.device, samples)

    def indices(self) -> list[list[int]]:
        """Returns the indices of the samples of each batch."""
        starts = range(0, self.num_samples, self.batch_size)
        return [list(range(start, min(start + self.batch_size, self.num_samples))) for start in starts]

    def rows(self, indices: Sequence[int]) -> list[int]:
        """Returns the row numbers of some samples, in the order in which the denoiser receives them."""
        row_numbers = []
        for branch in range(self.calibration.branches):
            for index in indices:
                start = index - index % self.batch_size
                size = min(self.batch_size, self.num_samples - start)
                row_numbers.append(start * self.calibration.branches + branch * size + index - start)
        return row_numbers

    def step_of_rows(self) -> list[int]:
        """Returns the position in the sampler's loop of each row, in the order of the row numbers."""
        return self._of_rows(self.calibration.step_index.tolist())

    def trajectory_of_rows(self) -> list[int]:
        """Returns the number of the trajectory that each row comes from, in the order of the row numbers."""
        return self._of_rows(self.calibration.trajectory_index.tolist())

    def of_every_step(self, count: int) -> list[int]:
        """Returns the indices of about `count` samples, as many of each step as it has, in the order of the steps.

        A step with few samples is represented too: where predictions are hardest, there may be few.
        """
        steps = self.calibration.step_index[: self.num_samples]
        each = max(1, count // len(steps.unique()))
        return [int(index) for step in steps.unique() for index in (steps == step).nonzero().flatten()[:each]]

    def _of_rows(self, values: Sequence[int]) -> list[int]:
        """Returns the value of each row's sample; there is one per sample."""
        return [values[index] for part in self.indices() for _ in range(self.calibration.branches) for index in part]

    def call(self, indices: Sequence[int]) -> Call:
        """Returns the arguments of the denoiser for some samples."""
        key = tuple(indices)
        held, version = self._held.get(key, (None, 0))
        if held is None or _version_of(held) != version:  # a denoiser has written into its arguments
            held = self.calibration.call(indices, self.device, torch.float32)
            if not self._is_batch(key) or _bytes_of(held) * len(self) > _HELD_BYTES.get(self.device.type, 0):
                return held
            self._held[key] = held, _version_of(held)
        args, kwargs = _copied(held)
        return args, kwargs

    def later_bytes(self) -> int:
        """Returns the bytes by which the calls that stay on the device will still grow."""
        return sum(_bytes_of(held) for held, _ in list(self._held.values())[:1]) * (len(self) - len(self._held))

    def _is_batch(self, indices: tuple[int, ...]) -> bool:
        """Returns whether samples are one of the batches, and not a part of one or other samples."""
        start = indices[0]
        return start % self.batch_size == 0 and indices == tuple(
            range(start, min(start + self.batch_size, self.num_samples))
        )

    def __iter__(self) -> Iterator[Call]:
        return (self.call(indices) for indices in self.indices())


def _copied(tree: Any) -> Any:
    """Returns the same tensors in new containers, which a denoiser may change."""
    if isinstance(tree, tuple | list):
        return type(tree)(_copied(item) for item in tree)
    return {key: _copied(item) for key, item in tree.items()} if isinstance(tree, dict) else tree


def _bytes_of(call: Call) -> int:
    """Returns the bytes of all tensors of a call."""
    return sum(tensor.nbytes for tensor in flat_tensors(call))


def _version_of(call: Call) -> int:
    """Returns how often the tensors of a call have been written into."""
    return sum(tensor._version for tensor in flat_tensors(call))
