"""Bits are spent where they lower the error most, and never more of them than the budget has."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edadm_cli.artifacts import LayerSensitivity, Sensitivity
from edadm_cli.calibrate.bit_budget import assign_bits, bytes_beside_codes, layer_costs, spend_budget
from edadm_cli.config import BitWidth
from edadm_cli.errors import UsageError
from edadm_cli.models.stored import place_stored
from edadm_cli.models.units import trace
from edadm_cli.quant.plan import LayerPlan
from edadm_cli.recipe import LayerRule, Recipe

WIDTHS = (2, 4, 8)


def test_the_layer_that_hurts_gets_the_bits() -> None:
    errors = {"sensitive": {4: 1.0, 8: 0.01}, "robust": {4: 0.02, 8: 0.01}}
    assert assign_bits(errors, {name: {4: 40, 8: 80} for name in errors}, 120) == {"sensitive": 8, "robust": 4}


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.integers(1, 50), st.lists(st.floats(1e-6, 10), min_size=3, max_size=3)), min_size=1, max_size=4
    ),
    st.floats(2, 8),
)
def test_no_other_choice_within_the_budget_is_better(layers: list[tuple[int, list[float]]], average: float) -> None:
    errors = {str(i): dict(zip(WIDTHS, costs, strict=True)) for i, (_, costs) in enumerate(layers)}
    sizes = {str(i): size for i, (size, _) in enumerate(layers)}
    budget = average * sum(sizes.values())
    chosen = assign_bits(
        errors, {name: {width: width * size for width in WIDTHS} for name, size in sizes.items()}, budget
    )

    def cost(bits: tuple[int, ...]) -> float:
        return sum(errors[name][width] for name, width in zip(errors, bits, strict=True))

    allowed = [
        bits
        for bits in product(WIDTHS, repeat=len(layers))
        if sum(width * sizes[name] for name, width in zip(errors, bits, strict=True)) <= budget
    ]
    assert tuple(chosen[name] for name in errors) in allowed
    assert cost(tuple(chosen[name] for name in errors)) <= min(map(cost, allowed)) * 1.001 + 1e-6


class _Net(nn.Module):
    """Three linear layers of 16 weights each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.third(self.second(self.first(x)))
        return result


def _spent(
    bits: str, *rules: LayerRule, measured: Sequence[str] = ("first", "second", "third"), grouped: bool = False
) -> dict[str, int]:
    net = _Net().requires_grad_(False)
    errors = {"first": {2: 9.0, 4: 1.0, 8: 0.1}, "second": {2: 3.0, 4: 0.5, 8: 0.1}, "third": {2: 1.0, 4: 0.2, 8: 0.1}}
    layers = tuple(
        LayerSensitivity(
            name=name,
            unit=name,
            num_weights=16,
            weight_errors=errors[name],
            group_errors={2: 0.5, 4: 0.3} if grouped else {},
            activation_errors={},
        )
        for name in measured
    )
    sensitivity = Sensitivity(layers=layers, step_gains=(1.0,), num_samples=1, group_size=8 if grouped else None)
    recipe = Recipe(name="test", layers=rules)
    width = BitWidth.parse(bits)
    return spend_budget(width, [layer_costs(sensitivity, width, recipe, net, trace(net, (torch.ones(1, 4),), {}))])


def test_an_average_below_the_fewest_bits_is_refused() -> None:
    with pytest.raises(UsageError, match="too small: the fewest that were measured are 4"):
        _spent("auto:3a8", LayerRule(pattern="third", weight_bits=8))


def test_groups_have_errors_of_their_own_and_pay_for_their_multipliers() -> None:
    """A row of four weights has a multiplier of four bits, so that codes of two bits cost three bits per weight."""
    assert _spent("auto:2a8", grouped=True) == {"first": 2, "second": 2, "third": 2}, "without groups in --bits"
    assert _spent("auto:3g8a8", grouped=True) == {"first": 2, "second": 2, "third": 2}
    with pytest.raises(UsageError, match="the fewest that were measured are 3"):
        _spent("auto:2.99g8a8", grouped=True)
    assert sorted(_spent("auto:4.7g8a8", grouped=True).values()) == [2, 2, 8], "eight bits have no multipliers"
    assert sorted(_spent("auto:4.4g8a8", grouped=True).values()) == [2, 4, 4]


def test_groups_that_were_not_measured_are_an_error_with_the_next_command() -> None:
    with pytest.raises(UsageError, match="groups of 16 was not measured") as caught:
        _spent("auto:4g16a8", grouped=True)
    assert "--group-size 16" in str(caught.value.hint)


def test_the_bits_of_the_recipe_s_rules_are_part_of_the_budget() -> None:
    assert _spent("auto:4a8") == {"first": 4, "second": 4, "third": 4}
    assert _spent("auto:4a8", LayerRule(pattern="third", weight_bits=8)) == {"first": 2, "second": 2, "third": 8}
    assert _spent("auto:4a8", LayerRule(pattern="third", weight_bits=3), measured=["first", "second"])["third"] == 3


def test_a_layer_that_the_recipe_leaves_in_float_takes_no_bits() -> None:
    assert _spent("auto:6a8", LayerRule(pattern="second", exclude=True)) == {"first": 8, "third": 4}


def test_a_rule_without_bits_leaves_them_to_the_budget() -> None:
    assert _spent("auto:4a8", LayerRule(pattern="*", float_input=True)) == {"first": 4, "second": 4, "third": 4}


def test_a_layer_that_was_not_measured_is_an_error_with_the_next_command() -> None:
    with pytest.raises(UsageError, match="'third', whose sensitivity was not measured") as caught:
        _spent("auto:4a8", measured=["first", "second"])
    assert "edadm sensitivity" in str(caught.value.hint)


def test_the_size_beside_the_codes_is_the_same_for_weights_that_stay_on_disk() -> None:
    net = _Net().requires_grad_(False)
    with torch.device("meta"):
        stored = _Net()
    place_stored(stored, {name: lambda *_, t=tensor: t for name, tensor in net.named_parameters()}, torch.device("cpu"))
    plans = {"first": LayerPlan(weight_bits=4), "second": LayerPlan(weight_bits=4, channel_parts=(2, 2))}
    sizes = [bytes_beside_codes(each, trace(each, (torch.ones(1, 4),), {}), plans) for each in (net, stored)]
    # the third layer and all biases, then six numbers per part, and the names of all tensors
    numbers, names = 16 + 3 * 4 + 3 * (4 + 2), 6 + 3 + 7
    assert sizes == [4 * numbers + 140 * names] * 2
