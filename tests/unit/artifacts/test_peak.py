"""Peak memory: it is that of the stage, in the record and in the manifest."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from edadm_cli.artifacts import BuildSpec, ModelRef, RunFolder, shared_keys
from edadm_cli.artifacts import peak as peaks

MIB = 2**20
KEYS = {"peak_memory_mib", "peak_cuda_memory_mib"}


def _hold(mib: int) -> None:
    """Take some memory and give it back."""
    torch.ones(mib * MIB // 4)


def test_a_peak_stays_when_the_memory_is_given_back_and_begins_anew() -> None:
    peaks.reset_peak()
    before = peaks.resident_peak_mib()
    _hold(256)
    assert before + 200 < peaks.peak_memory()["peak_memory_mib"] < before + 400  # type: ignore[operator]
    peaks.reset_peak()
    assert peaks.resident_peak_mib() < before + 100


def test_a_system_that_keeps_no_such_mark_is_asked_in_another_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = peaks.resident_peak_mib()
    monkeypatch.setattr(peaks, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(peaks, "_CLEAR", tmp_path / "none" / "none")
    peaks.reset_peak()
    assert peaks.resident_peak_mib() >= 0.9 * expected


def test_parts_of_a_stage_do_not_hide_its_peak_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = [300 * MIB, 100 * MIB]

    def reset(index: int | torch.device) -> None:
        marks[0 if isinstance(index, torch.device) else index] = 50 * MIB

    fake = SimpleNamespace(
        is_initialized=lambda: True,
        device_count=lambda: 2,
        max_memory_allocated=lambda index: marks[0 if isinstance(index, torch.device) else index],
        reset_peak_memory_stats=reset,
    )
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(peaks, "_reached", {})
    assert peaks.peak_memory()["peak_cuda_memory_mib"] == 300.0
    peaks.reset_cuda_peak(torch.device("cuda"))
    assert marks == [50 * MIB, 100 * MIB]
    assert peaks.peak_memory()["peak_cuda_memory_mib"] == 300.0
    peaks.reset_peak()
    assert peaks.peak_memory()["peak_cuda_memory_mib"] == 50.0


def test_the_record_and_the_manifest_say_it(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    plan = BuildSpec("collect", None, {}, 0, (), ModelRef(id="tiny", fingerprint="f"))
    peaks.reset_peak()
    _hold(64)
    with run.build(plan) as build:
        artifact = build.commit()
    keys = shared_keys(run.root, artifact, up_to_date=False, started=0.0, warnings=())
    assert set(keys) >= KEYS
    for actual in (keys, artifact.manifest.environment):
        assert actual["peak_memory_mib"] > 64
        assert torch.cuda.is_initialized() or actual["peak_cuda_memory_mib"] is None
