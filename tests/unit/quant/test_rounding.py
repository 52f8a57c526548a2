"""Learned rounding starts at the float weights and ends within one code of nearest."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edadm_cli.quant.rounding import (
    initial_alpha,
    rectified_sigmoid,
    rounding_regularizer,
    sharpness_at,
    undecided_share,
)


def _case(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 40, generator=generator), torch.rand(6, 1, generator=generator) * 0.3 + 0.01


@given(st.integers(0, 10_000))
@settings(max_examples=30)
def test_h_starts_as_the_fraction_that_flooring_drops(seed: int) -> None:
    weight, scale = _case(seed)
    h = rectified_sigmoid(initial_alpha(weight, scale))
    torch.testing.assert_close(h, weight / scale - (weight / scale).floor(), atol=2e-6, rtol=0)
    soft = ((weight / scale).floor() + h) * scale
    torch.testing.assert_close(soft, weight, atol=1e-5, rtol=1e-5)


@given(st.integers(0, 10_000))
@settings(max_examples=30)
def test_hardened_at_the_start_it_rounds_to_nearest(seed: int) -> None:
    weight, scale = _case(seed)
    hardened = (weight / scale).floor() + (initial_alpha(weight, scale) >= 0)
    fraction = weight / scale - (weight / scale).floor()
    decided = (fraction - 0.5).abs() > 1e-6  # at a half, nearest is either
    assert torch.equal(hardened[decided], (weight / scale).round()[decided])


@given(st.integers(0, 10_000))
@settings(max_examples=30)
def test_whatever_is_learned_the_code_is_within_one_of_nearest(seed: int) -> None:
    weight, scale = _case(seed)
    alpha = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) * 10
    hardened = (weight / scale).floor() + (alpha >= 0)
    assert ((hardened - weight / scale).abs() <= 1).all()
    assert ((hardened - (weight / scale).round()).abs() <= 1).all()


def test_h_reaches_0_and_1_exactly() -> None:
    h = rectified_sigmoid(torch.tensor([-20.0, -3.0, 0.0, 3.0, 20.0]))
    assert h.tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_the_regularizer_is_zero_once_decided_and_largest_at_a_half() -> None:
    assert float(rounding_regularizer(torch.tensor([0.0, 1.0]), 2.0)) == 0.0
    assert float(rounding_regularizer(torch.full((3,), 0.5), 2.0)) == 3.0
    alpha = torch.tensor([-0.5, 0.5], requires_grad=True)
    rounding_regularizer(rectified_sigmoid(alpha), torch.tensor(2.0)).backward()
    assert alpha.grad is not None
    assert alpha.grad[0] > 0 > alpha.grad[1], "descent moves every h away from a half"
    h = torch.tensor([0.0, 0.1, 0.5, 0.7, 1.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(3 * rounding_regularizer(h, torch.tensor(7.5)), h)
    distance = 2 * h.detach() - 1
    torch.testing.assert_close(gradient, -3 * 7.5 * 2 * distance.abs().pow(6.5) * distance.sign())


def test_sharpness_is_one_until_it_grows_and_reaches_its_last_value() -> None:
    values = [sharpness_at(step / 100, last=20.0, start=0.3) for step in range(101)]
    assert values[:31] == [1.0] * 31
    assert values == sorted(values)
    assert abs(values[-1] - 20) < 1e-9
    assert abs(values[65] - 20**0.5) < 1e-9, "geometric: half of the way is the square root"
    assert {sharpness_at(step / 10, last=1.0, start=0.0) for step in range(11)} == {1.0}


@given(st.integers(0, 10_000))
@settings(max_examples=20)
def test_a_sharper_h_is_more_decided_and_rounds_the_same_way(seed: int) -> None:
    alpha = initial_alpha(*_case(seed))
    plain, sharp = rectified_sigmoid(alpha), rectified_sigmoid(alpha, torch.tensor(20.0))
    assert torch.equal(plain, rectified_sigmoid(alpha, torch.ones(())))
    assert undecided_share(sharp) < undecided_share(plain)
    away = (alpha.abs() > 1e-3) & (sharp != plain)
    assert torch.equal((sharp > 0.5)[away], (alpha > 0)[away])
