"""Range search: never worse than min-max in its own norm, zero on the grid, one side where the data have one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edadm_cli.quant.grid import Grid, activation_grid, fake_quantize, weight_grid
from edadm_cli.quant.histogram import Histogram
from edadm_cli.quant.search import Range, activation_range, symmetric_scale, weight_scales
from edadm_cli.recipe import RangeRecipe

MINMAX = RangeRecipe(weight="minmax", activation="minmax")
SYMMETRIC = RangeRecipe(activation="search")
ASYMMETRIC = RangeRecipe(activation="search-asymmetric")
NORM = 2.4


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _range(x: Tensor, grid: Grid, recipe: RangeRecipe) -> Range:
    return Range(*activation_range(Histogram.of(x), grid, recipe).tolist())


def _error(x: Tensor, actual: Range, grid: Grid) -> float:
    scale, zero_point = actual.parameters(grid)
    quantized = fake_quantize(x, torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), grid)
    return float((quantized - x).abs().pow(NORM).mean())


def _skewed(seed: int) -> Tensor:
    """What SiLU leaves: a short negative tail, a long positive one."""
    return torch.nn.functional.silu(_normal(seed, 20_000) * 2)


def test_each_channels_searched_scale_is_the_best_of_the_candidates() -> None:
    weight, grid = _normal(0, 5, 3, 3, 3), weight_grid(4)
    recipe = RangeRecipe(num_candidates=20)
    actual = weight_scales(weight, grid, recipe)
    assert actual.shape == (5,)
    for row, scale in zip(weight.flatten(1), actual, strict=True):
        errors = {}
        for candidate in range(1, 21):
            tried = row.abs().max() / grid.quant_max * candidate / 20
            codes = (row / tried).round().clamp(grid.quant_min, grid.quant_max)
            errors[float(tried)] = float((codes * tried - row).abs().pow(NORM).sum())
        assert float(scale) == pytest.approx(min(errors, key=lambda key: errors[key]))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_searched_weight_scales_beat_minmax(bits: int) -> None:
    weight, grid = _normal(1, 16, 200) ** 3, weight_grid(bits)  # heavy tails
    errors = []
    for recipe in (ASYMMETRIC, MINMAX):
        scale = weight_scales(weight, grid, recipe)[:, None]
        codes = (weight / scale).round().clamp(grid.quant_min, grid.quant_max)
        errors.append((codes * scale - weight).abs().pow(NORM).sum(dim=1))
    assert bool((errors[0] <= errors[1]).all())
    if bits <= 4:
        assert errors[0].sum() < 0.8 * errors[1].sum()


def test_a_channel_of_zeros_gets_a_usable_scale() -> None:
    for recipe in (ASYMMETRIC, MINMAX):
        scale = weight_scales(torch.zeros(2, 9), weight_grid(4), recipe)
        assert bool((scale > 0).all())
        assert bool(torch.isfinite(scale.reciprocal()).all())


@given(st.floats(-3, 3), st.floats(0.01, 10), st.integers(0, 10_000), st.sampled_from([2, 3, 4, 8]), st.booleans())
@settings(max_examples=40)
def test_the_asymmetric_search_is_never_worse_than_minmax(
    shift: float, spread: float, seed: int, bits: int, heavy: bool
) -> None:
    x = _normal(seed, 3000)
    x = (x**3 if heavy else x) * spread + shift
    grid = activation_grid(bits)
    searched, plain = (_error(x, _range(x, grid, recipe), grid) for recipe in (ASYMMETRIC, MINMAX))
    # the search sees a histogram of at least 2048 bins: its errors are off by a share of a bin's width
    bin_width = float(max(x.max(), 0) - min(x.min(), 0)) / 2048
    assert searched ** (1 / NORM) <= plain ** (1 / NORM) + bin_width


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_asymmetric_beats_symmetric_on_skewed_data(bits: int) -> None:
    x, grid = _skewed(2), activation_grid(bits)
    asymmetric, symmetric = (_error(x, _range(x, grid, recipe), grid) for recipe in (ASYMMETRIC, SYMMETRIC))
    assert asymmetric < 0.6 * symmetric


@pytest.mark.parametrize("recipe", [SYMMETRIC, ASYMMETRIC, MINMAX], ids=["search", "asymmetric", "minmax"])
@pytest.mark.parametrize("sign", [1, -1])
def test_data_of_one_sign_use_every_code_for_it(recipe: RangeRecipe, sign: int) -> None:
    grid = activation_grid(8)
    actual = _range(sign * _normal(3, 5000).abs(), grid, recipe)
    _, zero_point = actual.parameters(grid)
    assert zero_point == (grid.quant_min if sign > 0 else grid.quant_max)


def test_the_symmetric_search_is_symmetric_on_data_of_two_signs() -> None:
    for bits in (4, 8):
        grid = activation_grid(bits)
        _, zero_point = _range(_skewed(4), grid, SYMMETRIC).parameters(grid)
        assert zero_point == 2 ** (bits - 1)


@given(st.floats(-100, 0), st.floats(0, 100), st.sampled_from(range(2, 9)))
@settings(max_examples=100)
def test_parameters_put_zero_on_the_grid_and_cover_the_range(low: float, high: float, bits: int) -> None:
    grid = activation_grid(bits)
    scale, zero_point = Range(low, high).parameters(grid)
    assert scale > 0
    assert grid.quant_min <= zero_point <= grid.quant_max
    covered = (grid.quant_min - zero_point) * scale, (grid.quant_max - zero_point) * scale
    # rounding the zero-point shifts the range by at most half a step
    assert covered[0] <= low + scale * 0.5001
    assert covered[1] >= high - scale * 0.5001


@pytest.mark.parametrize("recipe", [SYMMETRIC, ASYMMETRIC, MINMAX], ids=["search", "asymmetric", "minmax"])
def test_an_input_that_is_always_zero_stays_zero(recipe: RangeRecipe) -> None:
    grid = activation_grid(8)
    scale, zero_point = _range(torch.zeros(100), grid, recipe).parameters(grid)
    zero = torch.tensor(zero_point, dtype=torch.int32)
    assert fake_quantize(torch.zeros(4), torch.tensor(scale), zero, grid).tolist() == [0.0] * 4


def test_signed_scales_of_queries_and_keys_beat_minmax() -> None:
    x, grid = _normal(5, 20_000) ** 3, weight_grid(4)
    zero = torch.tensor(0, dtype=torch.int32)

    def error(**fields: Any) -> float:
        scale = symmetric_scale(Histogram.of(x), grid, RangeRecipe(**fields))
        return float((fake_quantize(x, scale, zero, grid) - x).abs().pow(NORM).mean())

    assert error(activation="search") < 0.5 * error(activation="minmax")
    assert float(symmetric_scale(Histogram.of(x), grid, MINMAX)) == pytest.approx(float(x.abs().max()) / grid.quant_max)


def test_the_counts_of_batches_are_those_of_all_values_at_once_in_any_order() -> None:
    x = _normal(6, 5000) ** 3 * 0.01
    pieces = [x[:1000] * 0.001, x[1000:1500], torch.cat([x[1500:], torch.tensor([-700.0])])]
    whole = Histogram.of(torch.cat(pieces))
    for order in (pieces, pieces[::-1]):
        pooled = Histogram.of(*order)
        assert torch.equal(pooled.counts, whole.counts)
        assert (pooled.exponent, pooled.low, pooled.high) == (whole.exponent, whole.low, whole.high)
    assert int(whole.counts.sum()) == 5001
    centers, shares = whole.bins()
    width = float(whole.high - whole.low) / 1024
    assert float(shares.sum()) == pytest.approx(1)
    assert all(float((centers - value).abs().min()) <= width for value in torch.cat(pieces)[::50])


def test_the_range_of_pooled_batches_is_the_best_for_all_of_them() -> None:
    small, large, grid = _skewed(6), _skewed(7) * 5, activation_grid(4)
    pooled = Range(*activation_range(Histogram.of(small, large), grid, ASYMMETRIC).tolist())
    both = torch.cat([small, large])
    assert _error(both, pooled, grid) < min(_error(both, _range(x, grid, ASYMMETRIC), grid) for x in (small, large * 3))
    assert _error(both, pooled, grid) == pytest.approx(_error(both, _range(both, grid, ASYMMETRIC), grid))
