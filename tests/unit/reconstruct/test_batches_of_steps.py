"""Samples of every step of a calibration set."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch

from edadm_cli.reconstruct.batches import Batches


def test_a_step_with_few_samples_is_among_those_of_every_step() -> None:
    steps = torch.tensor([0] * 10 + [1] * 10 + [2])
    calibration = cast("Any", SimpleNamespace(step_index=steps))
    batches = Batches(calibration, 4, torch.device("cpu"), num_samples=len(steps))
    assert batches.of_every_step(9) == [0, 1, 2, 10, 11, 12, 20]
