"""All units in order: every layer ends quantized, memory and interruptions change nothing, and results are stored."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edadm_cli.artifacts import UnitLosses
from edadm_cli.models.units import Unit
from edadm_cli.quant.attention import QuantizedAttention
from edadm_cli.quant.layers import quantized_layers
from edadm_cli.recipe import AttentionRecipe, Recipe
from edadm_cli.reconstruct.blocks import BlockReconstruction, Workspace, unit_seed
from edadm_cli.reconstruct.checkpoint import UnitCheckpoints
from edadm_cli.reconstruct.unit_data import UnitResult

MakeSetting = Callable[..., Any]
RESIDUAL = "up_blocks.0.resnets.0"
ATTENTION = Recipe(name="attention", attention=AttentionRecipe(quantize=True))
BUDGET = 2**28


def _reconstruction(setting: Any, folder: Path, budget: int = BUDGET) -> BlockReconstruction:
    return BlockReconstruction(
        setting.network,
        setting.plan,
        setting.nearest(),
        setting.batches,
        setting.hyperparameters,
        seed=3,
        workspace=Workspace(setting.cache(folder, budget), UnitCheckpoints(folder)),
    )


def _params(results: dict[str, UnitResult]) -> dict[str, Tensor]:
    return {name: tensor for result in results.values() for name, tensor in result.params.items()}


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class TestAllUnits:
    def _run(self, make_setting: MakeSetting, folder: Path, *, budget: int = BUDGET, **fields: Any) -> Any:
        setting = make_setting(**{"iterations": 2, "input_drop": 0.5, **fields})
        results = _reconstruction(setting, folder, budget).run(setting.units(), lambda _: None)
        return setting, results

    def test_every_planned_layer_ends_quantized(self, make_setting: MakeSetting, tmp_path: Path) -> None:
        setting, results = self._run(make_setting, tmp_path, recipe=ATTENTION)
        assert set(_params(results)) == set(setting.nearest())
        names = {name.split(".part")[0] for name in quantized_layers(setting.denoiser)}
        assert names == set(setting.plan.layers)
        processors = {type(setting.denoiser.get_submodule(n).processor) for n in setting.plan.attentions}
        assert processors == {QuantizedAttention}

    def test_memory_changes_how_often_it_captures_and_nothing_else(
        self, make_setting: MakeSetting, tmp_path: Path, denoiser: Any
    ) -> None:
        original = copy.deepcopy(denoiser.state_dict())
        wide, wide_results = self._run(make_setting, tmp_path / "wide")
        wide.restore()
        assert all(torch.equal(denoiser.state_dict()[name], original[name]) for name in original)
        _, narrow_results = self._run(make_setting, tmp_path / "narrow", budget=1)
        assert _same(_params(wide_results), _params(narrow_results))
        assert list(tmp_path.rglob("*.rows")) == []

    def test_units_that_do_not_learn_keep_their_nearest_rounding(
        self, make_setting: MakeSetting, tmp_path: Path
    ) -> None:
        setting = make_setting(iterations=20, weight_learning_rate=0.5)
        nearest = setting.nearest()
        results = _reconstruction(setting, tmp_path).run(setting.units(), lambda _: None, {RESIDUAL})
        assert set(results) == {RESIDUAL}
        layers = quantized_layers(setting.denoiser)
        assert {name.split(".part")[0] for name in layers} == set(setting.plan.layers)
        kept = {name for name, layer in layers.items() if torch.equal(layer.weight_int, nearest[f"{name}.weight_int"])}
        changed = set(layers) - kept
        assert changed
        assert all(name.startswith(RESIDUAL + ".") for name in changed)

    def test_a_unit_that_was_finished_is_not_learned_again(
        self, make_setting: MakeSetting, tmp_path: Path, denoiser: Any
    ) -> None:
        calm, results = self._run(make_setting, tmp_path / "calm")
        calm.restore()
        setting = make_setting(iterations=2, input_drop=0.5)
        units = setting.units()
        stopped = _reconstruction(setting, tmp_path / "stopped")

        def stop(_: int, done: list[int] = []) -> None:  # noqa: B006
            done.append(1)
            if len(done) == 4:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            stopped.run(units, stop)
        assert len(os.listdir(tmp_path / "stopped" / "units")) == 4
        setting.restore()
        _, again = self._run(make_setting, tmp_path / "stopped")
        assert _same(_params(again), _params(results))
        assert [r.losses.curve for r in again.values()] == [r.losses.curve for r in results.values()]

    def test_layer_by_layer_attention_is_quantized_with_the_searched_ranges(
        self, make_setting: MakeSetting, tmp_path: Path
    ) -> None:
        setting = make_setting(recipe=ATTENTION, iterations=0)
        reconstruction = _reconstruction(setting, tmp_path)
        reconstruction.run(setting.units("layer"), lambda _: None)
        for name in setting.plan.attentions:
            processor = setting.denoiser.get_submodule(name).processor
            assert isinstance(processor, QuantizedAttention)
            assert torch.equal(processor.q_scale, setting.ranges[f"{name}.q_scale"])


def test_each_unit_has_a_seed_of_its_own() -> None:
    seeds = {unit_seed(seed, index) for seed in range(20) for index in range(300)}
    assert len(seeds) == 20 * 300
    assert all(0 <= seed < 2**63 for seed in (unit_seed(2**63 - 1, 5), unit_seed(0, 0)))


def test_a_finished_unit_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    unit = Unit("mid.block", "layer", torch.nn.Identity(), ("mid.block",))
    codes = {"mid.block.weight_int": torch.tensor([1, -8], dtype=torch.int8)}
    losses = UnitLosses(loss_before=0.1, loss_after=1e-17 / 3, curve=(0.1 + 0.2,), loss_soft=0.3, undecided=0.25)
    result = UnitResult(codes, losses)
    kept = UnitCheckpoints(tmp_path)
    assert kept.load(3, unit) is None
    kept.save(3, unit, result)
    actual = kept.load(3, unit)
    assert actual is not None
    assert _same(actual.params, result.params)
    assert actual.losses == losses
    assert kept.load(4, unit) is None
    (tmp_path / "units" / "0003-mid.block" / "unit.json").unlink()
    assert kept.load(3, unit) is None, "what was not finished is done again"
