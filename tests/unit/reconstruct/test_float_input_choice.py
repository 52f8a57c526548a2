"""Which process chooses the inputs that stay in floating point, and that it chooses them once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edadm_cli.processes import ALONE, Processes
from edadm_cli.reconstruct import float_inputs, planned
from edadm_cli.reconstruct.float_inputs import plan_float_inputs
from tests.unit.reconstruct.test_gptq import MakeSetting


class _Second(Processes):
    """A process whose main process has decided."""

    index, count = 1, 2

    def __init__(self, decided: Any) -> None:
        self.decided = decided

    def share(self, value: Any) -> Any:
        assert value is None
        return self.decided


def test_the_main_process_chooses_for_all(make_setting: MakeSetting, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = make_setting()
    recipe = setting.recipe.ranges.model_copy(update={"float_input_share": 0.2})
    chosen = plan_float_inputs(setting.context(), recipe, 0, ALONE).plan
    names = [name for name, layer in chosen.layers.items() if layer != setting.plan.layers[name]]
    assert names
    assert all(chosen.layers[name].activation_bits is None for name in names)
    monkeypatch.delattr(type(setting.denoiser), "forward")  # another process measures nothing
    assert plan_float_inputs(setting.context(), recipe, 0, _Second(names)).plan == chosen


def test_a_resumed_run_keeps_the_inputs_that_it_had_chosen(
    make_setting: MakeSetting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    setting = make_setting()
    ranges = setting.recipe.ranges.model_copy(update={"float_input_share": 0.2})
    config = SimpleNamespace(recipe=setting.recipe.model_copy(update={"ranges": ranges}), seed=0)
    task: Any = SimpleNamespace(config=config, processes=ALONE)

    def prepare(_task: Any, _place: str, _note: Any, plan: Any = None) -> Any:
        context = setting.context()
        return context if plan is None else replace(context, plan=plan)

    monkeypatch.setattr(planned, "prepare", prepare)
    first, second = [name for name, layer in setting.plan.layers.items() if layer.activation_bits][:2]
    for choice in ([first], [second]):  # on a GPU the second measurement may come out otherwise
        monkeypatch.setattr(float_inputs, "find_float_inputs", lambda *_, choice=choice: choice)
        plan = planned.planned_context(task, "", tmp_path, print).plan
        assert [name for name, layer in plan.layers.items() if layer != setting.plan.layers[name]] == [first]
