"""Which figures are computed, left out, or refused."""

from __future__ import annotations

import pytest

from edadm_cli.errors import InputError, UsageError
from edadm_cli.evaluate.metrics import METRICS, MetricChoice


def test_only_inception_features_give_a_fid() -> None:
    names = {name for name in METRICS["digits"]}
    assert not names & {"fid", "kid", "sfid", "inception_score"}
    assert {"fid", "kid", "sfid", "inception_score"} <= METRICS["inception"].keys()


def test_default_figures_fall_away_with_a_reason() -> None:
    choice = MetricChoice(METRICS["inception"], ())
    choice.drop_without_real((), has_images=False)
    assert set(choice.wanted) == {"inception_score", "clip_score"}
    assert set(choice.skipped) == {"fid", "sfid", "kid", "precision", "recall"}


def test_statistics_alone_allow_frechet_distances_of_their_layer() -> None:
    choice = MetricChoice(METRICS["inception"], ())
    choice.drop_without_real(["pooled"], has_images=False)
    assert set(choice.wanted) == {"fid", "inception_score", "clip_score"}


def test_named_figures_do_not_fall_away() -> None:
    choice = MetricChoice(METRICS["inception"], ("kid", "inception_score"))
    assert set(choice.wanted) == {"kid", "inception_score"}
    with pytest.raises(InputError, match="kid cannot be computed"):
        choice.drop_without_real(["pooled"], has_images=False)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="frechet_distance"):
        MetricChoice(METRICS["digits"], ("fid",))


def test_figures_about_prompts_leave_without_a_word_where_there_are_none() -> None:
    choice = MetricChoice(METRICS["digits"], ())
    choice.forget_prompted()
    assert "prompt_accuracy" not in choice.wanted
    assert choice.skipped == {}


def test_neighbours_need_images() -> None:
    choice = MetricChoice(METRICS["digits"], ())
    choice.drop_too_few(3)
    assert set(choice.skipped) == {"precision", "recall"}
    choice = MetricChoice(METRICS["digits"], ())
    choice.drop_too_few(4)
    assert choice.skipped == {}
