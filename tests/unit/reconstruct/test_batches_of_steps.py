"""Samples of every step of a calibration set."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from edadm_cli.reconstruct import batches as batches_module
from edadm_cli.reconstruct.batches import Batches


def test_a_step_with_few_samples_is_among_those_of_every_step() -> None:
    steps = torch.tensor([0] * 10 + [1] * 10 + [2])
    calibration = cast("Any", SimpleNamespace(step_index=steps))
    batches = Batches(calibration, 4, torch.device("cpu"), num_samples=len(steps))
    assert batches.of_every_step(9) == [0, 1, 2, 10, 11, 12, 20]


def test_small_calls_stay_on_the_device_and_large_ones_and_parts_of_batches_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[tuple[int, ...]] = []

    def call(indices: Any, device: torch.device, dtype: torch.dtype) -> Any:
        made.append(tuple(indices))
        return (torch.tensor(indices, dtype=dtype),), {"condition": {"text": torch.zeros(4)}}

    calibration = cast("Any", SimpleNamespace(call=call))
    for held, expected in ((0, 2), (2 * 2 * 4 * 6, 1)):  # two batches of at most six numbers in float32
        monkeypatch.setitem(batches_module._HELD_BYTES, "cpu", held)
        batches = Batches(calibration, 2, torch.device("cpu"), num_samples=3)
        made.clear()
        passes = [[args[0].tolist() for args, _ in batches] for _ in range(2)]
        assert passes == [[[0, 1], [2]]] * 2
        assert made == [(0, 1), (2,)] * expected
        batches.call([0])
        batches.call([0])
        assert made[-2:] == [(0,), (0,)], "half of a batch is not held"
        _, kwargs = batches.call([0, 1])
        kwargs["condition"].clear()
        assert batches.call([0, 1])[1]["condition"], "the caller may change the containers"
        for samples in ([1, 2], [2, 0], [1]):  # of every step, or a part of a batch
            batches.call(samples)
        assert batches._held.keys() == ({(0, 1), (2,)} if held else set())
        args, _ = batches.call([0, 1])
        args[0].add_(5)
        assert batches.call([0, 1])[0][0].tolist() == [0, 1], "the caller may write into the tensors"


def test_calls_that_will_stay_on_the_device_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = cast("Any", SimpleNamespace(call=lambda indices, *_: ((torch.zeros(len(indices)),), {})))
    monkeypatch.setitem(batches_module._HELD_BYTES, "cpu", 100)
    for size, later in ((2, 2 * 8), (20, 0)):  # three batches of 8 bytes stay; those of 80 bytes do not
        batches = Batches(calibration, size, torch.device("cpu"), num_samples=3 * size)
        batches.call(batches.indices()[0])
        assert batches.later_bytes() == later
