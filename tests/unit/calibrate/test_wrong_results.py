"""An object of another package that returns something else than its interface says is named, with what it returned."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from edadm_cli.calibrate import transforming
from edadm_cli.errors import MachineError
from edadm_cli.evaluate.evaluator import Evaluator
from edadm_cli.metrics.base import Value
from edadm_cli.quant.plan import LayerPlan, QuantizationPlan
from edadm_cli.quant.transforms import ChannelStatistics

PLAN = LayerPlan(weight_bits=8, activation_bits=8, transform="mine")
STATISTICS = ChannelStatistics(torch.ones(2), torch.ones(2))


def _use(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> Any:
    transform = SimpleNamespace(name="mine", options={}, tensors=("factor",), **functions)
    monkeypatch.setattr(transforming, "transform_named", lambda _: transform)
    return transform


@pytest.mark.parametrize("result", [None, {}, {"other": torch.zeros(1)}])
def test_a_transform_that_calibrates_other_tensors(monkeypatch: pytest.MonkeyPatch, result: Any) -> None:
    with pytest.raises(MachineError, match=r"The transform 'mine' of .* returned .* a dictionary with 'factor' is"):
        _calibrate(monkeypatch, result)


@pytest.mark.parametrize("tensor", [None, 1.0, torch.zeros(3), torch.zeros(1, 2)])
def test_a_transform_that_calibrates_another_shape(monkeypatch: pytest.MonkeyPatch, tensor: Any) -> None:
    with pytest.raises(MachineError, match=r"The transform 'mine' of .* a tensor with shape \(2,\) is expected"):
        _calibrate(monkeypatch, {"factor": tensor})
    params = _calibrate(monkeypatch, {"factor": torch.zeros(2)})
    assert list(params) == ["layer.factor"]


def _calibrate(monkeypatch: pytest.MonkeyPatch, result: Any) -> dict[str, torch.Tensor]:
    _use(monkeypatch, calibrate=lambda *_: result)
    layer: Any = SimpleNamespace(name="layer", weight=nn.Linear(2, 2).weight)
    traced: Any = SimpleNamespace(layers=[layer])
    plan = QuantizationPlan(layers={"layer": PLAN})
    return transforming.calibrate_transforms(traced, plan, (), {"layer": STATISTICS})


def test_a_transform_that_changes_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    transform = _use(monkeypatch, fold=lambda weight, _: weight[1:], apply=lambda x, *_: x[1:])
    with pytest.raises(MachineError, match=r"The transform 'mine' .* a tensor with shape \(4, 2\) is expected"):
        transforming.folded(torch.ones(4, 2), "layer", PLAN, {"layer.factor": torch.ones(2)})
    with pytest.raises(MachineError, match=r"The transform 'mine' .* a tensor with shape \(4, 2\) is expected"):
        transforming.transformed(torch.ones(4, 2), transform, {}, -1)


@pytest.mark.parametrize(
    ("result", "is_paired", "expected"),
    [
        ("seven", False, r"returned 'seven', where a 'Value' of"),
        (Value("seven", "pixels", 2), False, r"with numbers in 'value' and 'num_images'"),  # type: ignore[arg-type]
        (Value(7.0, "pixels", 2, (1.0,)), True, r"with 2 numbers in 'per_image'"),
    ],
)
def test_a_metric_that_returns_no_value(result: Any, is_paired: bool, expected: str) -> None:
    metric: Any = SimpleNamespace(paired=is_paired, compute=lambda *_: result)
    evaluator = Evaluator({"mine": metric}, {}, "", None, None, None, None)
    images: Any = torch.zeros(2, 3, 4, 4)
    with pytest.raises(MachineError, match=rf"The metric 'mine' of the package types .*{expected}"):
        evaluator.values(images, images, paired=is_paired)
