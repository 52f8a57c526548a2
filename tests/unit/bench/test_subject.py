"""What `bench` measures of a model without a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from edadm_cli.bench import subject


def test_random_weights_are_made_on_the_device_that_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []

    def build(location: str, *, device: torch.device, **ignored: Any) -> nn.Module:
        devices.append(device)
        return nn.Linear(1, 1)

    monkeypatch.setattr(subject, "build_denoiser", build)
    device = torch.device("cpu", 0)  # another object than the default, without a GPU
    denoiser = subject.NearestSubject("sd15-random", None, 0, device).full_precision()
    assert devices == [device]
    assert all(parameter.device.type == "cpu" for parameter in denoiser.parameters())
