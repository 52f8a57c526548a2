"""TDAC: against its definition, its invariances, and the traps that a direct transcription falls into."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity

from edadm_cli.select import tdac
from edadm_cli.select.strategies import ScoredSteps, Tdac, total_variation
from edadm_cli.select.tdac import (
    Scores,
    density,
    integer_counts,
    normalise,
    normalised_scores,
    quantile_distance,
    score_steps,
)

weights_lists = st.lists(st.floats(0, 1e6, allow_nan=False, allow_subnormal=False), min_size=1, max_size=60)


def features(num_steps: int = 7, seed: int = 0) -> Tensor:
    """Maps `(T, 3, 5, 2, 4)` that drift over the steps, as a denoiser's do."""
    generator = torch.Generator().manual_seed(seed)
    drift = torch.linspace(0, 2, num_steps).pow(2).reshape(-1, 1, 1, 1, 1)
    return drift + torch.randn(num_steps, 3, 5, 2, 4, generator=generator)


def counts_of(
    scores: Scores, num_samples: int, weight: float, radius: float | None = None, quantile: float = 0.05
) -> Tensor:
    """Counts of the strategy `tdac`, which chooses nothing at random."""
    normalised = normalised_scores(scores, radius, quantile)
    steps = ScoredSteps(torch.arange(len(scores.variety)), normalised.density, normalised.variety, weight)
    return Tdac().counts(steps, num_samples, torch.Generator())


def distances_by_definition(maps: Tensor) -> Tensor:
    exact = maps.double()
    return torch.stack([torch.stack([(a - b).pow(2).mean() for b in exact]) for a in exact])


def variety_by_definition(maps: Tensor) -> Tensor:
    rows = [
        sum((1 - cosine_similarity(a.double(), b.double(), dim=1)).sum() for j, b in enumerate(maps) if j != i)
        for i, a in enumerate(maps)
    ]
    return torch.stack([torch.as_tensor(row) for row in rows])


@pytest.mark.parametrize("slice_elements", [2**22, 7 * 5, 7 * 5 * 3, 7 * 5 * 8 * 2])
def test_scores_equal_their_definition_whatever_the_slices(
    slice_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tdac, "_SLICE_ELEMENTS", slice_elements)
    maps = features()
    scores = score_steps(maps)
    torch.testing.assert_close(scores.distances, distances_by_definition(maps), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(scores.variety, variety_by_definition(maps), atol=1e-10, rtol=1e-12)


def test_density_counts_the_other_steps_within_the_radius() -> None:
    distances = torch.tensor([[0, 1, 4], [1, 0, 2], [4, 2, 0]], dtype=torch.float64)
    assert density(distances, 1.0).tolist() == [1, 1, 0]  # a distance of exactly r is within
    assert density(distances, 0.5).tolist() == [0, 0, 0]
    assert density(distances, 9.0).tolist() == [2, 2, 2]
    assert [quantile_distance(distances, share) for share in (0.05, 0.34, 0.5, 1.0)] == [1.0, 2.0, 2.0, 4.0]
    assert quantile_distance(torch.zeros(1, 1, dtype=torch.float64), 0.05) == 0.0


def test_a_local_radius_tells_steps_apart_where_the_median_does_not() -> None:
    """Steps along a path: with the median, density mirrors variety and the counts are flat."""
    place = torch.cumsum(torch.linspace(0.5, 2.0, 21), 0)
    distances = (place[:, None] - place[None, :]).square().double()
    scores = Scores(distances, distances.sqrt().sum(1))
    far = {share: total_variation(counts_of(scores, 256, 1.0, quantile=share).tolist()) for share in (0.05, 0.5)}
    assert normalised_scores(scores, None).radius == quantile_distance(distances, 0.05)
    assert far[0.05] > 2 * far[0.5]


def test_total_variation_of_equal_counts_is_zero() -> None:
    assert total_variation([3, 3, 3]) == 0
    assert total_variation([9, 0, 0]) == pytest.approx(2 / 3)


def test_token_features_are_scored_like_maps() -> None:
    maps = features()
    tokens = maps.flatten(3)
    assert torch.equal(score_steps(maps).variety, score_steps(tokens).variety)


def test_scores_ignore_the_order_of_rows_and_positions_and_follow_that_of_steps() -> None:
    maps = features(9)
    before = score_steps(maps)
    rows, steps = torch.tensor([2, 0, 1]), torch.randperm(9, generator=torch.Generator().manual_seed(3))
    shuffled = score_steps(maps[:, rows].flip(-1))
    torch.testing.assert_close(shuffled.distances, before.distances)
    torch.testing.assert_close(shuffled.variety, before.variety)
    moved = score_steps(maps[steps])
    torch.testing.assert_close(moved.distances, before.distances[steps][:, steps])
    torch.testing.assert_close(moved.variety, before.variety[steps])


def test_the_default_radius_follows_the_features_scale_and_the_counts_do_not() -> None:
    maps = features(12)
    small, large = score_steps(maps), score_steps(1000 * maps)
    assert normalised_scores(large, None).radius == pytest.approx(1e6 * normalised_scores(small, None).radius)
    assert torch.equal(counts_of(large, 100, 1.2), counts_of(small, 100, 1.2))


@pytest.mark.parametrize("value", [0.0, 1.0, 3.7e4, 1e-20])
@pytest.mark.parametrize("radius", [None, 0.3])
def test_identical_features_share_samples_equally(value: float, radius: float | None) -> None:
    one = value * torch.randn(1, 4, 6, 3, 3, generator=torch.Generator().manual_seed(1))
    scores = score_steps(one.expand(10, -1, -1, -1, -1))
    assert counts_of(scores, 50, 1.2, radius).tolist() == [5] * 10
    assert not normalised_scores(scores, radius).density.any()
    assert not normalised_scores(scores, radius).variety.any()


def test_a_single_step_takes_all() -> None:
    scores = score_steps(features(1))
    assert counts_of(scores, 8, 1.0).tolist() == [8]
    assert normalised_scores(scores, None).radius == 0.0


def test_a_lone_step_is_rare_in_density_and_rich_in_variety() -> None:
    maps = features(1).expand(10, -1, -1, -1, -1).clone()
    maps[3] = -maps[3]
    scores = score_steps(maps)
    by_density = counts_of(scores, 90, 0.0)
    assert by_density[3] == 0
    assert by_density.sum() == 90
    assert counts_of(scores, 90, 1e6).argmax() == 3


def test_normalising_spans_zero_to_one_and_equal_scores_become_zero() -> None:
    assert normalise(torch.tensor([2.0, 4.0, 3.0])).tolist() == [0.0, 1.0, 0.5]
    assert normalise(torch.full((4,), 7)).tolist() == [0.0] * 4
    nearly = torch.full((4,), 7.0, dtype=torch.float64) + torch.arange(4) * 1e-15
    assert normalise(nearly).tolist() == [0.0] * 4


@settings(max_examples=300)
@given(weights_lists, st.integers(0, 5000))
def test_counts_sum_to_n_and_are_never_negative(weights: list[float], num_samples: int) -> None:
    counts = integer_counts(torch.tensor(weights, dtype=torch.float64), num_samples)
    assert int(counts.sum()) == num_samples
    assert int(counts.min()) >= 0


@given(weights_lists, st.integers(1, 5000))
def test_counts_stay_near_their_shares(weights: list[float], num_samples: int) -> None:
    tensor = torch.tensor(weights, dtype=torch.float64)
    counts = integer_counts(tensor, num_samples)
    if tensor.sum() > 0:
        assert ((counts - tensor / tensor.sum() * num_samples).abs() <= 1.5 + 1e-6).all()


def test_a_shortfall_goes_to_the_largest_counts() -> None:
    weights = torch.tensor([2.4, 3.4, 1.4, 2.8])  # rounds to 2, 3, 1, 3 of 10
    assert integer_counts(weights, 10).tolist() == [2, 4, 1, 3]


def test_an_excess_is_taken_from_the_last_steps_that_have_any() -> None:
    weights = torch.tensor([0.6, 0.6, 0.6, 0.6, 0.6, 0.0])  # rounds to five ones of 3, none in the last step
    assert integer_counts(weights, 3).tolist() == [1, 1, 1, 0, 0, 0]


def test_equal_weights_give_equal_counts() -> None:
    assert integer_counts(torch.zeros(4), 12).tolist() == [3] * 4
    assert integer_counts(torch.full((7,), 0.2), 7 * 30).tolist() == [30] * 7
