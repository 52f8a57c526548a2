"""Strategies without features, and the assignment of trajectories to steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edadm_cli.select.stage import assign_trajectories
from edadm_cli.select.strategies import last_counts, normal_counts, random_counts, uniform_counts

steps_and_samples = given(st.integers(1, 120), st.integers(0, 2000))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@steps_and_samples
def test_every_strategy_shares_out_exactly_n(num_steps: int, num_samples: int) -> None:
    for counts in (
        uniform_counts(num_steps, num_samples),
        last_counts(num_steps, num_samples),
        random_counts(num_steps, num_samples, seeded()),
        normal_counts(num_steps, num_samples, seeded()),
    ):
        assert counts.shape == (num_steps,)
        assert int(counts.sum()) == num_samples
        assert int(counts.min()) >= 0


@steps_and_samples
def test_uniform_counts_differ_by_one_at_most(num_steps: int, num_samples: int) -> None:
    counts = uniform_counts(num_steps, num_samples)
    assert int(counts.max() - counts.min()) <= 1


def test_last_takes_the_cleanest_step_only() -> None:
    assert last_counts(4, 9).tolist() == [0, 0, 0, 9]


def test_normal_is_skewed_to_the_clean_end_and_follows_its_density() -> None:
    counts = normal_counts(100, 200_000, seeded()).double() / 200_000
    from_the_end = torch.arange(100).flip(0).double() + 0.5
    expected = torch.exp(-0.5 * ((from_the_end / 100 - 0.4) / 0.4) ** 2)
    expected /= expected.sum()
    torch.testing.assert_close(counts, expected, atol=5 * (0.011 / 200_000) ** 0.5, rtol=0)
    assert (counts * from_the_end).sum() < 50


def test_drawn_counts_follow_their_generator() -> None:
    for draw in (random_counts, normal_counts):
        assert torch.equal(draw(50, 500, seeded(3)), draw(50, 500, seeded(3)))
        assert not torch.equal(draw(50, 500, seeded(3)), draw(50, 500, seeded(4)))


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
