"""Wrong arguments of the library's two functions are expected failures with one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import edadm_cli
from edadm_cli.errors import UsageError


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"num_steps": 0}, "field 'num_steps': input should be greater than or equal to 1; got 0"),
        ({"steps": 5}, "field 'steps': there is no such field"),
        ({"seed": -1}, "field 'seed'"),
        ({"text_encoders": "int4"}, "field 'text_encoders'"),
    ],
)
def test_a_wrong_argument_of_quantize_is_named(arguments: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=problem):
        edadm_cli.quantize("digits-sd", bits="w8a8", run=tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_an_unknown_element_type_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no element type 'fp16'.*float32, bfloat16, float16"):
        edadm_cli.load(tmp_path, device="cpu", dtype="fp16")


def test_completion_shows_what_the_package_offers() -> None:
    assert set(edadm_cli.__all__) <= set(dir(edadm_cli))
