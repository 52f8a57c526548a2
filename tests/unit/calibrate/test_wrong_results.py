"""An object of another package that returns something else than its interface says is named, with what it returned."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from edadm_cli.calibrate import ranges
from edadm_cli.errors import MachineError
from edadm_cli.evaluate.evaluator import Evaluator
from edadm_cli.quant.plan import LayerPlan, QuantizationPlan


@pytest.mark.parametrize("result", [None, {}, {"other": torch.zeros(1)}])
def test_a_transform_that_returns_other_tensors(monkeypatch: pytest.MonkeyPatch, result: Any) -> None:
    transform = SimpleNamespace(name="mine", options={}, tensors=("factor",), calibrate=lambda *_: result)
    monkeypatch.setattr(ranges, "transform_named", lambda _: transform)
    layer: Any = SimpleNamespace(name="layer", module=nn.Linear(2, 2))
    plan = QuantizationPlan(layers={"layer": LayerPlan(weight_bits=8, activation_bits=8, transform="mine")})
    traced: Any = SimpleNamespace(layers=[layer])
    statistics: Any = {"layer": None}
    with pytest.raises(MachineError, match=r"The transform 'mine' returned .* a dictionary with 'factor' is expected"):
        ranges.calibrate_transforms(traced, plan, (), statistics)


def test_a_metric_that_returns_no_value() -> None:
    metric: Any = SimpleNamespace(paired=False, compute=lambda *_: "seven")
    evaluator = Evaluator({"mine": metric}, {}, "", None, None, None, None)
    images: Any = torch.zeros(2, 3, 4, 4)
    with pytest.raises(MachineError, match=r"The metric 'mine' returned 'seven'"):
        evaluator.values(images, images, paired=False)
