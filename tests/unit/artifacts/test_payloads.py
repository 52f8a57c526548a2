"""Payloads are read through their models: what does not fit is one sentence that names the file and the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edadm_cli.artifacts import BuildSpec, ModelRef, RunFolder, Selection
from edadm_cli.errors import EXIT_INPUT, InputError

SELECTION: dict[str, Any] = {  # as version 0.1 wrote it
    "strategy": "tdac",
    "num_samples": 3,
    "num_trajectories": 4,
    "density_radius": 0.25,
    "density_radius_source": "given",
    "variety_weight": 1.5,
    "steps_from_the_clean_end": None,
    "timesteps": [751, 501, 1],
    "counts": [0, 2, 1],
    "density": [0.0, 1.0, 0.5],
    "variety": [1.0, 0, 0.5],
}


def load(folder: Path, text: str) -> Selection:
    run = RunFolder(folder / "a run")
    with run.build(BuildSpec("select", None, {}, 0, (), ModelRef(id="m", fingerprint="f"))) as build:
        (build.path / "selection.json").write_text(text, encoding="utf-8")
        build.commit()
    return Selection.load(run.open("select"))


def changed(**fields: Any) -> str:
    return json.dumps({**SELECTION, **fields})


def test_what_an_older_version_wrote_is_read_and_written_the_same(tmp_path: Path) -> None:
    selection = load(tmp_path, json.dumps(SELECTION))
    assert selection.counts == (0, 2, 1)
    selection.save(tmp_path)
    assert json.loads((tmp_path / "selection.json").read_text()) == SELECTION


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("[]", ""),
        ("", ""),
        ("{" * 100_000, ""),
        (changed(counts=[0, "2", 1]), "counts.1"),
        (changed(counts=[0, 3, 1]), "counts"),
        (changed(counts=[0, 3]), "counts"),
        (changed(counts=[-1, 3, 1]), "counts.0"),
        (changed(num_samples=1e308), "num_samples"),
        (changed(num_samples=True), "num_samples"),
        (changed(num_trajectories=10**30), "num_trajectories"),
        (changed(strategy={"name": "tdac"}), "strategy"),
        (changed(surprise=1), "surprise"),
        (json.dumps({key: value for key, value in SELECTION.items() if key != "density"}), "density"),
        (changed(density=[0.0, float("nan"), 1.0]), "NaN"),
        (changed().replace("0.25", "1e999"), "too large"),
        (changed().replace("751", "7" * 5000), "5000 digits"),
        (changed(density_radius_source="\ud800"), "surrogate"),
        (changed(**{"null\0character": 1}), "null character"),
    ],
)
def test_what_does_not_fit_is_one_sentence_with_file_and_field(tmp_path: Path, text: str, field: str) -> None:
    with pytest.raises(InputError) as caught:
        load(tmp_path, text)
    message = caught.value.message
    assert caught.value.exit_code == EXIT_INPUT
    assert "selection.json" in message
    assert field in message
    assert "\n" not in message
    assert len(message) < 400 + len(str(tmp_path))
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("edadm select --run '")
    assert caught.value.hint.endswith("a run' --force")
