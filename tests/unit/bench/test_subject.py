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
from edadm_cli.calibrate.nearest import nearest_ranges
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

    def small_unet() -> UNet2DModel:
        torch.manual_seed(0)
        return UNet2DModel(
            block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
        )

    def ranges_of(denoiser: nn.Module, recipe: Any, bits: BitWidth, calls: list[Any]) -> Any:
        shapes.append(subject.sample_of(denoiser, calls[0]).shape)
        return nearest_ranges(denoiser, recipe, bits, calls)

    monkeypatch.setattr(subject, "nearest_ranges", ranges_of)
    measured, bits = subject.NearestSubject("sd15-random", None, 0, size=(16, 24)), BitWidth.parse("w8a8")
    first, second = (measured.quantized(bits, small_unet).state_dict() for _ in range(2))
    assert shapes == [(1, 3, 16, 24)], "the second time takes no call"
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert any(name.endswith("weight_codes") for name in first)


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
