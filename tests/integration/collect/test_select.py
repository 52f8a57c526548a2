"""`select` on a tiny pipeline: every strategy, what it writes, and what it refuses."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from edadm_cli import plugins
from edadm_cli.artifacts import RunFolder
from edadm_cli.cli.app import main
from edadm_cli.collect import stage as collect
from edadm_cli.config import SelectConfig
from edadm_cli.errors import InputError, UsageError
from edadm_cli.select import stage as select
from edadm_cli.select import strategies
from edadm_cli.select.strategies import ScoredSteps, SelectionStrategy
from tests.integration.collect.helpers import STEPS, TRAJECTORIES, config_of, latents_of


@pytest.mark.parametrize("strategy", ["tdac", "uniform", "normal", "random", "last"])
def test_every_strategy_fills_the_calibration_set(sd_run: RunFolder, strategy: str) -> None:
    record = select.run(SelectConfig(strategy=strategy, num_samples=7), sd_run, force=True)
    artifact = sd_run.open("select")
    chosen = artifact.tensors("calibration.safetensors")
    scores = artifact.tensors("scores.safetensors")
    latents, timesteps = (
        latents_of(sd_run.open("collect")),
        sd_run.open("collect").tensors("features.safetensors")["timesteps"],
    )
    steps, trajectories = chosen["step_index"], chosen["trajectory_index"]
    assert sum(record.counts) == 7
    assert torch.bincount(steps, minlength=STEPS + 1).tolist() == list(record.counts) == scores["counts"].tolist()
    assert torch.equal(chosen["sample"], latents[steps, trajectories])
    assert torch.equal(chosen["timestep"], timesteps[steps])
    condition = sd_run.open("collect").tensors("condition.safetensors")
    for name, tensor in condition.items():
        assert torch.equal(chosen[name], tensor[trajectories])
    is_tdac = strategy == "tdac"
    assert (record.density_radius is not None) == (record.variety_weight is not None) == is_tdac
    selection = artifact.json("selection.json")
    assert selection["strategy"] == strategy
    assert selection["density_radius_source"] == ("5% quantile of the pairwise distances" if is_tdac else None)
    assert (selection["steps_from_the_clean_end"] is not None) == (strategy == "normal")


class _Densest(SelectionStrategy):
    """Takes every sample from the step whose features are most like those of others, as another package may."""

    name = "densest"
    description = "The densest step gives every sample."
    uses_scores = True

    def counts(self, steps: ScoredSteps, num_samples: int, generator: torch.Generator) -> torch.Tensor:
        return num_samples * torch.nn.functional.one_hot(steps.density.argmax(), len(steps))


class _TooFew(_Densest):
    name = "too-few"

    def counts(self, steps: ScoredSteps, num_samples: int, generator: torch.Generator) -> torch.Tensor:
        return super().counts(steps, num_samples - 1, generator)


class _List(_Densest):
    name = "list"

    def counts(self, steps: ScoredSteps, num_samples: int, generator: torch.Generator) -> Any:
        return [num_samples] + [0] * (len(steps) - 1)


def test_a_strategy_of_another_package_chooses_the_samples(
    sd_run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = (_Densest, _TooFew, _List)
    points = [EntryPoint(kind.name, f"{__name__}:{kind.__name__}", strategies.GROUP) for kind in kinds]
    known = plugins.entry_points
    monkeypatch.setattr(
        plugins, "entry_points", lambda group: points if group == strategies.GROUP else known(group=group)
    )
    strategies.strategies.cache_clear()
    command = ["select", "--run", str(sd_run.root), "--num-samples", "5", "--device", "cpu", "--force", "--json"]
    try:
        assert main([*command, "--strategy", "densest", "--density-radius", "0.5"]) == 0
        assert sorted(json.loads(capsys.readouterr().out)["counts"]) == [0] * STEPS + [5]
        assert main([*command, "--strategy", "too-few"]) == 4
        assert "'too-few' of the package " in capsys.readouterr().err
        assert main([*command, "--strategy", "list"]) == 4
        assert "a tensor of" in capsys.readouterr().err
    finally:
        strategies.strategies.cache_clear()
    selection = sd_run.open("select").json("selection.json")
    assert (selection["density_radius"], selection["strategy_description"]) == (0.5, _Densest.description)


def test_a_given_radius_and_weight_are_used_and_named(sd_run: RunFolder) -> None:
    record = select.run(SelectConfig(density_radius=1e9, variety_weight=0.0), sd_run, force=True)
    assert record.density_radius == 1e9
    assert record.counts == (2,) * (STEPS + 1)  # all steps alike within that radius
    assert sd_run.open("select").json("selection.json")["density_radius_source"] == "given"
    record = select.run(SelectConfig(model_radius=True), sd_run, force=True)
    source = sd_run.open("select").json("selection.json")["density_radius_source"]
    assert source == "the model has no published one: 5% quantile of the pairwise distances"
    assert record.total_variation is not None
    earlier = select.build_spec(SelectConfig(density_quantile=0.5), sd_run).config
    assert not {"density_quantile", "model_radius"} & earlier.keys(), "as artifacts of version 0.1 name it"


def test_the_plot_shows_something_on_a_transparent_ground(sd_run: RunFolder) -> None:
    select.run(SelectConfig(), sd_run)
    image = Image.open(sd_run.open("select").file("selection.png"))
    assert image.mode == "RGBA"
    assert image.width > 1000
    assert image.getpixel((2, 2))[3] == 0
    assert len(image.getcolors(maxcolors=2**24) or []) > 20


def test_more_samples_than_there_are_steps_are_refused(sd_run: RunFolder) -> None:
    with pytest.raises(UsageError, match="10 trajectories of"):
        select.run(SelectConfig(num_samples=1000), sd_run, force=True)
    with pytest.raises(UsageError, match="each of the 10 trajectories has that step once"):
        select.run(SelectConfig(strategy="last", num_samples=TRAJECTORIES + 1), sd_run, force=True)


def test_settings_of_tdac_mean_nothing_elsewhere(sd_run: RunFolder) -> None:
    with pytest.raises(UsageError, match="belongs to the strategy tdac"):
        select.run(SelectConfig(strategy="uniform", density_radius=1.0), sd_run)


def test_selecting_before_collecting_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        select.run(SelectConfig(), RunFolder(tmp_path))
    assert "edadm collect" in (caught.value.hint or "")


def test_another_collection_under_a_selection_is_reported(sd_run: RunFolder, tiny_sd: Path, prompts: Path) -> None:
    select.run(SelectConfig(), sd_run)
    collect.run(config_of(tiny_sd, prompts, seed=5), sd_run, force=True)
    with pytest.raises(InputError):
        sd_run.open("select")
