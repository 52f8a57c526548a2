"""The weights that a unit learns are those of the definition."""

from __future__ import annotations

import torch

from edadm_cli.quant.groups import codes_of
from edadm_cli.quant.plan import LayerPlan
from edadm_cli.quant.rounding import rectified_sigmoid
from edadm_cli.reconstruct.learned_values import LearnedRounding


def test_weights_in_groups_are_codes_times_multipliers_times_scales() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(4, 20, generator=generator), "b": torch.randn(3, 10, generator=generator)}
    plans = {"a": LayerPlan(weight_bits=4, activation_bits=8, group_size=8), "b": LayerPlan(weight_bits=8)}
    multipliers = torch.randint(1, 9, (4, 3), generator=generator).to(torch.int8)
    multipliers[:, 1] *= -1
    scales = {"a": torch.full((4,), 0.05), "b": torch.full((3,), 0.02)}
    rounding = LearnedRounding(weights, scales, plans, {"a": multipliers})
    decided, _ = rounding.weights(decided=True)
    integers = rounding.codes()
    codes = codes_of(integers["a"], multipliers, 8)
    assert codes.min() >= -8
    assert codes.max() <= 7
    torch.testing.assert_close(decided["a"], integers["a"] * 0.05)
    torch.testing.assert_close(decided["b"], integers["b"] * 0.02)
    learned, _ = rounding.weights(decided=True, scales={name: 2 * scale for name, scale in scales.items()})
    torch.testing.assert_close(learned["a"], integers["a"] * 0.1)
    started, _ = rounding.weights(
        decided=False
    )  # learning starts at the weights in full precision, where none is clipped
    inside = (codes > -8) & (codes < 7)
    torch.testing.assert_close(started["a"][inside], weights["a"][inside], atol=1e-5, rtol=1e-5)


def test_weights_are_clamped_codes_times_scales_and_so_are_their_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, scale = 3 * torch.randn(4, 50, generator=generator), torch.full((4,), 0.2)
    rounding = LearnedRounding({"a": weight}, {"a": scale}, {"a": LayerPlan(weight_bits=4, activation_bits=8)})
    with torch.no_grad():
        rounding.variables.copy_(torch.randn(200, generator=generator))
    alpha = rounding.variables.detach().clone().requires_grad_()
    grid = LayerPlan(weight_bits=4, activation_bits=8).weight_grid
    floor = (weight / 0.2).floor()
    assert (floor < grid.quant_min - 1).any(), "some weights lie below the grid"
    assert (floor > grid.quant_max).any(), "some lie above it"
    codes = (floor + rectified_sigmoid(alpha).view(4, 50)).clamp(grid.quant_min, grid.quant_max)
    expected, (learned, _) = codes * scale[:, None], rounding.weights(decided=False)
    assert torch.equal(learned["a"], expected)
    for total in (learned["a"], expected):
        (total * torch.arange(200.0).view(4, 50)).sum().backward()
    torch.testing.assert_close(rounding.variables.grad, alpha.grad, rtol=0, atol=0)
    rounded = (floor + (alpha.detach().view(4, 50) >= 0)).clamp(grid.quant_min, grid.quant_max)
    assert torch.equal(rounding.codes()["a"].float(), rounded)
    assert torch.equal(rounding.weights(decided=True)[0]["a"], rounded * scale[:, None])
