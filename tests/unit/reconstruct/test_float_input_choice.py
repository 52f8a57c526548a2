"""Which process chooses the inputs that stay in floating point."""

from __future__ import annotations

from typing import Any

import pytest

from edadm_cli.processes import ALONE, Processes
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
