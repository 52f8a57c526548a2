"""Which inputs stay in floating point: the estimate against the errors themselves, and the budget."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from edadm_cli.calibrate.float_inputs import InputHarm, choose_float_inputs, measure_input_errors
from edadm_cli.models.units import Trace, TracedLayer
from edadm_cli.quant.grid import activation_grid, fake_quantize
from edadm_cli.quant.plan import LayerPlan, QuantizationPlan

_ROWS, _CHANNELS = 512, 8


class _Chain(nn.Module):
    """Two linear layers, so that the first-order estimate is exact; the prediction is the entry of a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(_CHANNELS, _CHANNELS, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.second(self.first(x)),)


def test_the_estimated_shares_are_those_of_the_errors_that_rounding_each_input_causes() -> None:
    torch.manual_seed(0)
    chain, x = _Chain().requires_grad_(False), torch.randn(_ROWS, _CHANNELS)
    steps = {"first": 0.3, "second": 0.05}
    layers = [TracedLayer(name, chain.get_submodule(name), False, None) for name in steps]
    plan = QuantizationPlan(layers={name: LayerPlan(weight_bits=4, activation_bits=8) for name in steps})
    ranges = {f"{name}.input_scale": torch.tensor(step) for name, step in steps.items()}
    ranges |= {f"{name}.input_zero_point": torch.tensor(128, dtype=torch.int32) for name in steps}
    errors, products = measure_input_errors(
        chain, Trace(layers=layers), plan, ranges, [((part,), {}) for part in x.split(64)], seed=0
    )
    exact = []
    for name, value in (("first", x), ("second", chain.first(x))):
        rounded = fake_quantize(value, torch.tensor(steps[name]), torch.tensor(128), activation_grid(8))
        rest = chain if name == "first" else chain.second
        change = rest(rounded - value)
        exact.append((change[0] if isinstance(change, tuple) else change).square().sum(dim=1))
    first = exact[0].sum() / (exact[0].sum() + exact[1].sum())
    assert errors["first"].harm == pytest.approx(float(first), abs=0.06)
    assert errors["first"].harm + errors["second"].harm == pytest.approx(1)
    assert errors["first"].products == _CHANNELS**2
    assert products == 2 * _CHANNELS**2


def test_the_budget_is_spent_on_the_largest_errors_per_multiplication() -> None:
    errors = {
        "cheap": InputHarm(harm=0.2, products=10),
        "dear": InputHarm(harm=0.5, products=80),
        "large": InputHarm(harm=0.28, products=40),
        "harmless": InputHarm(harm=0.005, products=1),
    }
    assert choose_float_inputs(errors, 1000, 0.05) == ["cheap", "large"]
    assert choose_float_inputs(errors, 1000, 0.13) == ["cheap", "large", "dear"]
    assert choose_float_inputs(errors, 1000, 0.0) == []


class _Folded(_Chain):
    """The second layer sees its rows as several entries each; the prediction is a list with one tensor per row."""

    def forward(self, x: Tensor) -> tuple[list[Tensor]]:  # type: ignore[override]
        return (list(self.second(self.first(x).flatten(0, 1)).unflatten(0, (len(x), -1))),)


def test_multiplications_are_counted_per_row_of_the_call() -> None:
    net, x = _Folded().requires_grad_(False), torch.randn(6, 4, _CHANNELS)
    names = ("first", "second")
    layers = [TracedLayer(name, net.get_submodule(name), False, None) for name in names]
    plan = QuantizationPlan(layers={name: LayerPlan(weight_bits=4, activation_bits=8) for name in names})
    ranges = {f"{name}.input_scale": torch.tensor(0.1) for name in names}
    ranges |= {f"{name}.input_zero_point": torch.tensor(128, dtype=torch.int32) for name in names}
    errors, products = measure_input_errors(net, Trace(layers=layers), plan, ranges, [((x,), {})], seed=0)
    assert {name: error.products for name, error in errors.items()} == dict.fromkeys(names, 4 * _CHANNELS**2)
    assert products == 8 * _CHANNELS**2
