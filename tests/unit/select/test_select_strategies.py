"""Every strategy shares out what it is asked for, and the assignment of trajectories to steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edadm_cli.errors import UsageError
from edadm_cli.models.denoiser_calls.trajectories import assign_trajectories
from edadm_cli.select.strategies import ScoredSteps, strategies, strategy_named

steps_and_samples = given(st.integers(1, 120), st.integers(0, 2000))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def counts_of(name: str, num_steps: int, num_samples: int, seed: int = 0) -> Tensor:
    """Counts of a strategy over steps whose scores are random numbers."""
    density, variety = torch.rand(2, num_steps, generator=seeded(1), dtype=torch.float64)
    steps = ScoredSteps(torch.arange(num_steps).flip(0), density, variety, variety_weight=1.2)
    return strategy_named(name).counts(steps, num_samples, seeded(seed))


@steps_and_samples
def test_every_strategy_shares_out_exactly_n(num_steps: int, num_samples: int) -> None:
    for name in strategies():
        counts = counts_of(name, num_steps, num_samples)
        assert counts.dtype == torch.int64
        assert counts.shape == (num_steps,)
        assert int(counts.sum()) == num_samples
        assert int(counts.min()) >= 0


@steps_and_samples
def test_uniform_counts_differ_by_one_at_most(num_steps: int, num_samples: int) -> None:
    counts = counts_of("uniform", num_steps, num_samples)
    assert int(counts.max() - counts.min()) <= 1


def test_last_takes_the_cleanest_step_only() -> None:
    assert counts_of("last", 4, 9).tolist() == [0, 0, 0, 9]


def test_normal_is_skewed_to_the_clean_end_and_follows_its_density() -> None:
    counts = counts_of("normal", 100, 200_000).double() / 200_000
    from_the_end = torch.arange(100).flip(0).double() + 0.5
    expected = torch.exp(-0.5 * ((from_the_end / 100 - 0.4) / 0.4) ** 2)
    expected /= expected.sum()
    torch.testing.assert_close(counts, expected, atol=5 * (0.011 / 200_000) ** 0.5, rtol=0)
    assert (counts * from_the_end).sum() < 50


def test_random_counts_follow_their_generator() -> None:
    for name in ("random", "normal"):
        assert torch.equal(counts_of(name, 50, 500, 3), counts_of(name, 50, 500, 3))
        assert not torch.equal(counts_of(name, 50, 500, 3), counts_of(name, 50, 500, 4))


def test_an_unknown_strategy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"no strategy 'best'.*there are tdac, uniform, normal, random, last"):
        strategy_named("best")


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 300), st.integers(0, 2**31))
def test_trajectories_take_turns_and_give_no_step_twice(counts: list[int], number: int, seed: int) -> None:
    num_trajectories = max(number, *counts)
    step_index, trajectory_index = assign_trajectories(torch.tensor(counts), num_trajectories, seeded(seed))
    assert torch.bincount(step_index, minlength=len(counts)).tolist() == counts
    assert len(set(zip(step_index.tolist(), trajectory_index.tolist(), strict=True))) == sum(counts)
    given = torch.bincount(trajectory_index, minlength=num_trajectories)
    assert int(given.max()) - int(given.min()) <= 1
    assert len(given) == num_trajectories
    assert trajectory_index.tolist() == sorted(trajectory_index.tolist())


@pytest.mark.parametrize("seed", [0, 1])
def test_the_permutation_is_seeded(seed: int) -> None:
    counts = torch.full((10,), 10)
    first = assign_trajectories(counts, 200, seeded(seed))
    again = assign_trajectories(counts, 200, seeded(seed))
    other = assign_trajectories(counts, 200, seeded(seed + 2))
    assert torch.equal(first[1], again[1])
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[1], other[1])
