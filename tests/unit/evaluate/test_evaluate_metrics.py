"""Which metrics are computed, left out, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from edadm_cli.cli.settings import STAGES, build_config, read_config_file
from edadm_cli.errors import InputError, UsageError
from edadm_cli.evaluate.selection import MetricSelection
from edadm_cli.metrics.registry import metrics_of
from edadm_cli.models.registry import known_models


def selection(space: str, named: tuple[str, ...]) -> MetricSelection:
    return MetricSelection(metrics_of(space), named, space)


def unpaired(choice: MetricSelection) -> set[str]:
    return {name for name, metric in choice.selected.items() if not metric.paired}


def test_only_inception_features_give_a_fid() -> None:
    names = set(metrics_of("digits"))
    assert not names & {"fid", "kid", "sfid", "inception_score"}
    assert {"fid", "kid", "sfid", "inception_score"} <= metrics_of("inception").keys()


def test_default_metrics_fall_away_with_a_reason() -> None:
    choice = selection("inception", ())
    choice.drop_without_real((), has_images=False)
    assert unpaired(choice) == {"inception_score", "clip_score"}
    assert set(choice.skipped) == {"fid", "sfid", "kid", "precision", "recall"}


def test_statistics_alone_allow_frechet_distances_of_their_layer() -> None:
    choice = selection("inception", ())
    choice.drop_without_real(["pooled"], has_images=False)
    assert unpaired(choice) == {"fid", "inception_score", "clip_score"}


def test_named_metrics_do_not_fall_away() -> None:
    choice = selection("inception", ("kid", "inception_score"))
    assert unpaired(choice) == {"kid", "inception_score"}
    with pytest.raises(InputError, match="kid cannot be computed"):
        choice.drop_without_real(["pooled"], has_images=False)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="frechet_distance"):
        selection("digits", ("fid",))


def test_metrics_about_prompts_leave_without_a_word_where_there_are_none() -> None:
    choice = selection("digits", ())
    choice.forget_prompts()
    assert "prompt_accuracy" not in choice.selected
    assert choice.skipped == {}


def test_neighbours_need_images() -> None:
    choice = selection("digits", ())
    choice.drop_too_few(3)
    assert set(choice.skipped) == {"precision", "recall"}
    choice = selection("digits", ())
    choice.drop_too_few(4)
    assert choice.skipped == {}


def test_the_protocol_of_mlperf_is_a_configuration_that_its_stages_take() -> None:
    content = read_config_file(Path(__file__).parents[3] / "examples" / "mlperf-sdxl.toml")
    evaluate = build_config(STAGES["evaluate"], content, {"bits": "w8a8"})
    assert (evaluate.num_images, evaluate.metrics) == (5000, ("fid", "clip_score"))
    assert build_config(STAGES["collect"], content, {"model": "sdxl-mlperf"}).dtype == "float16"
    entry = known_models()["sdxl-mlperf"]
    assert (entry.num_steps, entry.guidance_scale) == (20, 8.0)
    assert "low quality" in entry.call_arguments["negative_prompt"]
