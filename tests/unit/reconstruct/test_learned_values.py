"""The weights that a unit learns are those of the definition."""

from __future__ import annotations

import torch

from edadm_cli.quant.plan import LayerPlan
from edadm_cli.quant.rounding import rectified_sigmoid
from edadm_cli.reconstruct.learned_values import LearnedRounding


def test_weights_are_clamped_codes_times_scales_and_so_are_their_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, scale = 3 * torch.randn(4, 50, generator=generator), torch.full((4,), 0.2)
    rounding = LearnedRounding({"a": weight}, {"a": scale}, {"a": LayerPlan(weight_bits=4, activation_bits=8)})
    with torch.no_grad():
        rounding.alpha.copy_(torch.randn(200, generator=generator))
    alpha = rounding.alpha.detach().clone().requires_grad_()
    grid = LayerPlan(weight_bits=4, activation_bits=8).weight_grid
    floor = (weight / 0.2).floor()
    assert (floor < grid.quant_min - 1).any(), "some weights lie below the grid"
    assert (floor > grid.quant_max).any(), "some lie above it"
    codes = (floor + rectified_sigmoid(alpha).view(4, 50)).clamp(grid.quant_min, grid.quant_max)
    expected, (learned, _) = codes * scale[:, None], rounding.weights(decided=False)
    assert torch.equal(learned["a"], expected)
    for total in (learned["a"], expected):
        (total * torch.arange(200.0).view(4, 50)).sum().backward()
    torch.testing.assert_close(rounding.alpha.grad, alpha.grad, rtol=0, atol=0)
    rounded = (floor + (alpha.detach().view(4, 50) >= 0)).clamp(grid.quant_min, grid.quant_max)
    assert torch.equal(rounding.codes()["a"].float(), rounded)
    assert torch.equal(rounding.weights(decided=True)[0]["a"], rounded * scale[:, None])
