"""What a stage prints for people: its own names and sentences, and no key of the JSON object."""

from __future__ import annotations

from typing import Any

import pytest

from edadm_cli.cli.app import main
from edadm_cli.cli.output import Output, show
from edadm_cli.cli.summaries import duration, size
from tests.unit.cli.conftest import FakeStages

EXPORT: dict[str, Any] = {
    "command": "export",
    "status": "done",
    "artifact": "runs/tiny/export/w4a8",
    "identity": "0123456789abcdef",
    "seconds": 137.47,
    "peak_memory_mib": 906.8,
    "peak_cuda_memory_mib": 2048.0,
    "bits": "w4a8",
    "size_mib": {"unet": 2.0, "denoiser_fp32": 16.0, "ratio": 8.0},
    "pipeline": {"disk_mib": 3.0, "disk_before_mib": 17.0, "memory_mib": 4.0, "memory_before_mib": 9.0},
    "text_encoders": {"text_encoder_2": {"size_mib": 5.0, "float_mib": 19.0, "rel_l2": 0.0034}},
    "parity": {"images_bit_equal": True, "latent_max_abs": 0.0, "integer_rel_l2": 2e-7, "integer_bound": 1e-5},
    "verdict": ["Layers: 3 in W4A8.", "The export is 1.50 times as fast on this machine."],
    "engine": {"name": "openvino", "artifact": "runs/tiny/engine/w4a8-openvino", "size_mib": 2.5},
}


def test_the_summary_of_an_export_has_sentences_and_its_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    show(Output.TABLE, EXPORT, None)
    text = capsys.readouterr().out
    assert "done in 2.3 min" in text
    assert "2 MiB on disk, 8.00 times smaller than 16 MiB in float32" in text
    assert "3 MiB on disk instead of 17 MiB; weights of 4 MiB in memory instead of 9 MiB" in text
    assert "907 MiB, and 2.00 GiB on the GPU" in text
    for sentence in (*EXPORT["verdict"], "The images before and after packing are equal.", "text_encoder_2"):
        assert sentence in text
    assert "size_mib" not in text
    assert "0123456789ab" not in text


def test_in_a_narrow_terminal_facts_are_folded_and_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    show(Output.TABLE, EXPORT, None)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) == 40
    words = [word for line in lines for word in line.strip("│ ").split("│")[-1].split()]
    assert EXPORT["verdict"][1] in " ".join(words)


@pytest.mark.parametrize("columns", ["40", "80"])
def test_an_evaluation_shows_its_values_and_names_in_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    metrics = {"spatial_frechet_distance": {"value": 21.95, "features": "digits/spatial", "num_images": 8}}
    distance = {"psnr_db": 25.32, "guided_one_step_rel_l2": 0.0633}
    record = {"command": "evaluate", "status": "up_to_date", "artifact": "run/w4a8", "bits": "w4a8"}
    record |= {"metrics": metrics, "full_precision": metrics, "distance_to_full_precision": distance, "verdict": []}
    show(Output.TABLE, record, None)
    text = capsys.readouterr().out
    for part in ("25.32 dB", "0.0633", "run/w4a8", "spatial_frechet_distance"):
        assert part in text
    assert "…" not in text


def test_a_difference_is_given_where_images_are_not_equal(capsys: pytest.CaptureFixture[str]) -> None:
    show(Output.TABLE, {**EXPORT, "parity": {"images_bit_equal": False, "latent_max_abs": 0.25}}, None)
    assert "differ by 0.25 or less" in capsys.readouterr().out


def test_an_upload_is_listed_file_by_file(capsys: pytest.CaptureFixture[str]) -> None:
    files = {"README.md": 2048, "unet/model.safetensors": 3 * 2**20}
    planned = {"command": "push", "status": "planned", "repository": "OWNER/NAME", "files": files, "url": None}
    show(Output.TABLE, {**planned, "seconds": 1.0, "card": "# A card"}, None)
    text = capsys.readouterr().out
    for part in ("OWNER/NAME", "2 files", "README.md, 2 KiB", "unet/model.safetensors, 3 MiB", "# A card"):
        assert part in text


@pytest.mark.parametrize("status", ["planned", "up to date"])
def test_a_dry_run_says_what_a_stage_would_take(
    status: str, stages: FakeStages, capsys: pytest.CaptureFixture[str]
) -> None:
    if status == "up to date":
        assert main(["collect", "--model", "tiny", "--quiet"]) == 0
    assert main(["collect", "--model", "tiny", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert status in text
    assert ("about 2.0 s" in text) == (status == "planned")


def test_run_prints_the_verdict_of_each_bit_width(stages: FakeStages, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--model", "tiny", "--bits", "w8a8,w4a8"]) == 0
    text = capsys.readouterr().out
    assert text.count("Layers: 4 in W4A8.") == 2
    assert text.count("No image is black.") == 2


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "0.0 s"), (119.9, "119.9 s"), (120, "2.0 min"), (9000, "2.5 h")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("mebibytes", "text"), [(0.0125, "12.8 KiB"), (1023, "1,023 MiB"), (1536, "1.50 GiB")])
def test_sizes(mebibytes: float, text: str) -> None:
    assert size(mebibytes) == text
