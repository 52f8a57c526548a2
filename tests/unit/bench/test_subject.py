"""What `bench` measures of a model without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from edadm_cli.artifacts import RunFolder
from edadm_cli.bench import stage, subject
from edadm_cli.config import BenchConfig, BitWidth
from edadm_cli.errors import EdadmError


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


def test_ranges_come_from_a_sample_of_the_size_that_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def quantize(denoiser: nn.Module, recipe: Any, bits: BitWidth, calls: list[Any]) -> None:
        shapes.append(subject.sample_of(denoiser, calls[0]).shape)

    monkeypatch.setattr(subject, "quantize_to_nearest", quantize)
    unet = UNet2DModel(
        block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
    )
    subject.NearestSubject("sd15-random", None, 0, size=(16, 24)).quantized(BitWidth.parse("w8a8"), lambda: unet)
    assert shapes == [(1, 3, 16, 24)]


@pytest.mark.parametrize(
    ("settings", "message", "code"),
    [
        ({"against": ("gptq",)}, "--against takes nncf, .*; got 'gptq'", 2),
        ({"threads": 100_000}, "--threads 100000 is more than the .* logical cores", 4),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_model_is_looked_for(
    tmp_path: Path, settings: dict[str, Any], message: str, code: int
) -> None:
    config = BenchConfig(model="no such model", bits=(BitWidth.parse("w8a8"),), device="cpu", **settings)
    with pytest.raises(EdadmError, match=message) as caught:
        stage.run(config, RunFolder(tmp_path))
    assert caught.value.exit_code == code
