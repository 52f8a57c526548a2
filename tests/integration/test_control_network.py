"""A control network: its residuals are inputs of the denoiser in every sample, and its own weights stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from edadm_cli.artifacts import RunFolder
from edadm_cli.config import CollectConfig, SelectConfig
from edadm_cli.errors import InputError
from edadm_cli.models.denoiser_calls.calibration import CalibrationSet
from tests.denoisers import table, unets

STEPS, TRAJECTORIES = 3, 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    unets.controlnet().save_pretrained(folder / "controlnet")
    unets.controlnet_inpaint().save_pretrained(folder / "inpaint")
    table.example_images(folder / "images")
    return folder


def collect(models: Path, name: str, run: RunFolder, pictures: Path | None, **changes: Any) -> None:
    from edadm_cli.collect import stage

    config = CollectConfig(
        model=str(models / name),
        num_trajectories=TRAJECTORIES,
        num_steps=STEPS,
        batch_size=2,
        images=pictures,
        device="cpu",
    )
    with table.entry_with({"height": 16, "width": 16, **changes}):
        stage.run(config, run)


def test_the_residuals_of_a_sample_are_those_that_the_denoiser_got(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edadm_cli.select import stage as select

    calls: list[tuple[float, torch.Tensor, dict[str, Any]]] = []
    forward = UNet2DConditionModel.forward

    def watched(self: Any, sample: torch.Tensor, timestep: Any, **kwargs: Any) -> Any:
        calls.append((float(timestep), sample.clone(), kwargs))
        return forward(self, sample, timestep, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", watched)
    run = RunFolder(tmp_path / "run")
    collect(models, "controlnet", run, models / "images")
    select.run(SelectConfig(device="cpu"), run)
    calibration = CalibrationSet.load(run.open("select"))
    for index in range(len(calibration)):
        _, kwargs = calibration.call([index], "cpu", torch.float32)
        sample, timestep = calibration.sample[index], float(calibration.timestep[index])
        row, recorded = next(
            (row, kwargs)
            for time, samples, kwargs in calls
            for row in range(len(samples) // 2)
            if time == timestep and torch.equal(samples[row], sample)
        )
        half = len(recorded["mid_block_additional_residual"]) // 2
        for name in ("mid_block_additional_residual", "down_block_additional_residuals"):
            tensors = [kwargs[name]] if isinstance(kwargs[name], torch.Tensor) else kwargs[name]
            originals = [recorded[name]] if isinstance(recorded[name], torch.Tensor) else recorded[name]
            for tensor, original in zip(tensors, originals, strict=True):
                torch.testing.assert_close(tensor, original[[row, half + row]], rtol=1e-4, atol=1e-5)


def test_guess_mode_is_refused_with_its_reason(models: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="guess mode"):
        collect(models, "controlnet", RunFolder(tmp_path / "run"), models / "images", guess_mode=True)


def test_missing_control_images_are_named(models: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        collect(models, "controlnet", RunFolder(tmp_path / "one"), None)
    assert "--images" in (caught.value.hint or "")
    pictures = table.example_images(tmp_path / "pictures")
    (pictures / "two.control.png").unlink()
    with pytest.raises(InputError, match=r"two\.control\.png is missing"):
        collect(models, "inpaint", RunFolder(tmp_path / "two"), pictures)
