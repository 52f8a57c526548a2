"""Weights in groups: multipliers, their packing, the search for them, and layers that hold them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from edadm_cli.calibrate.nearest import nearest_codes
from edadm_cli.errors import InputError
from edadm_cli.quant.gptq import gptq_codes
from edadm_cli.quant.grid import weight_grid
from edadm_cli.quant.groups import (
    LARGEST_MULTIPLIER,
    codes_of,
    num_groups,
    packed_multipliers,
    per_weight,
    search_groups,
    unpacked_multipliers,
)
from edadm_cli.quant.layers import QuantizedLayer, quantized_layer
from edadm_cli.quant.network import fill_layer
from edadm_cli.quant.plan import LayerPlan
from edadm_cli.quant.search import weight_scales
from edadm_cli.recipe import RangeRecipe


def random_weight(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def dequantized(integers: Tensor, scale: Tensor) -> Tensor:
    return integers.float() * scale.reshape(-1, *[1] * (integers.ndim - 1))


def test_multipliers_survive_packing() -> None:
    every = [*range(-LARGEST_MULTIPLIER, 0), *range(1, LARGEST_MULTIPLIER + 1)]
    multipliers = torch.tensor([every[:15], every[1:]], dtype=torch.int8)  # an odd number per channel
    packed = packed_multipliers(multipliers)
    assert packed.shape == (2, 8)
    assert torch.equal(unpacked_multipliers(packed, 15), multipliers)


@pytest.mark.parametrize(("shape", "size"), [((5, 40), 16), ((6, 3, 3, 3), 8), ((4, 10), 64)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_integers_are_codes_times_multipliers(shape: tuple[int, ...], size: int, bits: int) -> None:
    weight, grid = random_weight(*shape), weight_grid(bits)
    scale, multipliers = search_groups(weight, grid, size, RangeRecipe())
    assert multipliers.shape == (shape[0], num_groups(weight[0].numel(), size))
    integers = nearest_codes(weight, scale, LayerPlan(weight_bits=bits, group_size=size), multipliers)
    codes = codes_of(integers, multipliers, size)
    assert codes.min() >= grid.quant_min
    assert codes.max() <= grid.quant_max
    assert torch.equal(codes * per_weight(multipliers, shape, size), integers)


def test_the_multiplier_of_a_group_is_the_best_of_all_for_its_scale() -> None:
    weight, grid, recipe = random_weight(3, 24), weight_grid(3), RangeRecipe()
    scale, multipliers = search_groups(weight, grid, 8, recipe)
    chosen = errors(weight, scale, multipliers, recipe.norm)
    for other in range(-LARGEST_MULTIPLIER, LARGEST_MULTIPLIER + 1):
        if other:
            assert (chosen <= errors(weight, scale, torch.full_like(multipliers, other), recipe.norm) + 1e-6).all()


def errors(weight: Tensor, scale: Tensor, multipliers: Tensor, norm: float) -> Tensor:
    integers = nearest_codes(weight, scale, LayerPlan(weight_bits=3, group_size=8), multipliers)
    return (dequantized(integers, scale) - weight).abs().pow(norm).view(3, 3, 8).sum(dim=2)


@pytest.mark.parametrize("bits", [3, 4])
def test_small_groups_have_smaller_errors_than_channels(bits: int) -> None:
    weight, grid, recipe = random_weight(16, 512), weight_grid(bits), RangeRecipe()
    channel = weight_scales(weight, grid, recipe)
    before = (dequantized(nearest_codes(weight, channel, LayerPlan(weight_bits=bits)), channel) - weight).norm()
    scale, multipliers = search_groups(weight, grid, 16, recipe)
    integers = nearest_codes(weight, scale, LayerPlan(weight_bits=bits, group_size=16), multipliers)
    assert (dequantized(integers, scale) - weight).norm() < 0.85 * before


def test_without_a_search_no_weight_is_clipped() -> None:
    weight, grid = random_weight(8, 96), weight_grid(4)
    scale, multipliers = search_groups(weight, grid, 32, RangeRecipe(weight="minmax"))
    integers = nearest_codes(weight, scale, LayerPlan(weight_bits=4, group_size=32), multipliers)
    steps = scale[:, None] * per_weight(multipliers, (8, 96), 32)
    assert ((dequantized(integers, scale) - weight).abs() <= steps / 2 + 1e-6).all()


def test_importance_moves_the_error_to_weights_that_matter_less() -> None:
    weight, grid, recipe = random_weight(8, 64), weight_grid(3), RangeRecipe()
    importance = torch.ones(8, 64)
    importance[:, ::4] = 100.0
    plan = LayerPlan(weight_bits=3, group_size=32)

    def weighted_error(importance_of_search: Tensor | None) -> Tensor:
        scale, multipliers = search_groups(weight, grid, 32, recipe, importance_of_search)
        integers = nearest_codes(weight, scale, plan, multipliers)
        return ((dequantized(integers, scale) - weight).square() * importance).sum()

    assert weighted_error(importance) < weighted_error(None)


def test_gptq_rounds_in_steps_of_the_groups() -> None:
    weight, grid, plan = random_weight(6, 32), weight_grid(4), LayerPlan(weight_bits=4, group_size=16)
    scale, multipliers = search_groups(weight, grid, 16, RangeRecipe())
    factors = per_weight(multipliers, (6, 32), 16)
    integers = gptq_codes(
        weight, scale, torch.eye(32), grid, factors
    )  # equal and independent inputs: nothing to correct
    assert torch.equal(integers, nearest_codes(weight, scale, plan, multipliers))


def test_a_layer_computes_with_the_integers_that_it_was_given() -> None:
    linear = nn.Linear(40, 6)
    plan = LayerPlan(weight_bits=4, activation_bits=8, group_size=16)
    layer = quantized_layer(linear, plan)
    assert isinstance(layer, QuantizedLayer)
    params = filled(layer, linear)
    assert layer.weight_codes.shape == (6, 20)
    assert layer.weight_multiplier.shape == (6, 2)  # three groups, two of which share a byte
    assert {name: tuple(value.shape) for name, value in layer.parameters_by_name()} == layer.parameter_shapes()
    assert torch.equal(layer.weight_int, params["layer.weight_int"])
    x = random_weight(3, 40)
    quantized = layer(x)
    layer.arithmetic = "integer"
    torch.testing.assert_close(layer(x), quantized, atol=1e-5, rtol=1e-5)
    assert (quantized - linear(x)).norm() < 0.2 * linear(x).norm()


def filled(layer: QuantizedLayer, linear: nn.Linear, **changes: Tensor) -> dict[str, Tensor]:
    assert layer.plan.group_size is not None
    weight = linear.weight.detach()
    scale, multipliers = search_groups(weight, layer.plan.weight_grid, layer.plan.group_size, RangeRecipe())
    params = {
        "weight_int": nearest_codes(weight, scale, layer.plan, multipliers),
        "weight_scale": scale,
        "weight_multiplier": multipliers,
        "input_scale": torch.tensor(0.05),
        "input_zero_point": torch.tensor(128, dtype=torch.int32),
    } | changes
    named = {f"layer.{key}": value for key, value in params.items()}
    fill_layer(layer, "layer", named)
    return named


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_multiplier": torch.zeros(6, 3, dtype=torch.int8)}, "multipliers of groups are"),
        ({"weight_multiplier": torch.full((6, 3), 9, dtype=torch.int8)}, "multipliers of groups are"),
        ({"weight_int": torch.full((6, 40), 127, dtype=torch.int8)}, "no multiple of the multiplier|outside -8"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(changes: dict[str, Tensor], message: str) -> None:
    linear = nn.Linear(40, 6)
    layer = quantized_layer(linear, LayerPlan(weight_bits=4, activation_bits=8, group_size=16))
    assert isinstance(layer, QuantizedLayer)
    with pytest.raises(InputError, match=message):
        filled(layer, linear, **changes)
