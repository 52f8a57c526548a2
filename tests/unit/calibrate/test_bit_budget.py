"""Bits are spent where they lower the error most, and never more of them than the budget has."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edadm_cli.calibrate.bit_budget import assign_bits
from edadm_cli.errors import UsageError

WIDTHS = (2, 4, 8)


def test_the_layer_that_hurts_gets_the_bits() -> None:
    errors = {"sensitive": {4: 1.0, 8: 0.01}, "robust": {4: 0.02, 8: 0.01}}
    assert assign_bits(errors, {"sensitive": 10, "robust": 10}, 120) == {"sensitive": 8, "robust": 4}


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
    chosen = assign_bits(errors, sizes, budget)

    def cost(bits: tuple[int, ...]) -> float:
        return sum(errors[name][width] for name, width in zip(errors, bits, strict=True))

    allowed = [
        bits
        for bits in product(WIDTHS, repeat=len(layers))
        if sum(width * sizes[name] for name, width in zip(errors, bits, strict=True)) <= budget
    ]
    assert tuple(chosen[name] for name in errors) in allowed
    assert cost(tuple(chosen[name] for name in errors)) <= min(map(cost, allowed)) * 1.001 + 1e-6


def test_a_budget_below_the_fewest_bits_is_refused() -> None:
    with pytest.raises(UsageError, match="too small"):
        assign_bits({"a": {4: 1.0}}, {"a": 10}, 39)
