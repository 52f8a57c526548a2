"""`edadm bench` and `edadm engines` on the command line: what the flags become, what is printed, exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edadm_cli.artifacts import Artifact, BenchRecord, BuildSpec, Estimate, ModelRef, RunFolder
from edadm_cli.bench import STAGE
from edadm_cli.cli.app import main
from edadm_cli.config import BenchConfig
from tests.unit.cli.conftest import FakeStages, _install, _install_estimate


def record(run: RunFolder) -> BenchRecord:
    parity = {"max_rel_l2": 2e-6, "bound": 1e-5, "layer": "a", "layers_checked": 1, "layers": 1}
    parity |= {"prediction_rel_l2": 0.01, "prediction_bound": 0.05, "quantization_rel_l2": 0.1}
    speedup = {"contender": "openvino w8a8", "vs_fp32_eager": 5.0, "vs_best_float": 1.6, "best_float": "torch float32"}
    coverage = {"planned": 1, "quantized": 1, "kept": 0}
    latency = {"median": 2.0, "min": 1.0, "max": 3.0, "num_samples": 3}
    contender = {"name": "openvino w8a8", "engine": "openvino", "dtype": "float32", "bits": "w8a8", "compiled": True}
    contender |= {"latency_ms": latency, "peak_memory_mib": 100.0, "load_memory_mib": 1.0, "load_seconds": 1.0}
    contender |= {"size_mib": 1.0, "throughput": {"1": 500.0, "4": 600.0}}
    eager = {**contender, "name": "torch float32", "engine": "torch", "bits": None}
    facts = {"coverage": coverage, "parity": parity, "speedup": speedup, "by_kind": []}
    layer = {"name": "a", "kind": "conv2d", "planned": "w8a8", "precision": "int8", "reason": None}
    return BenchRecord.model_validate(
        {
            "status": "done",
            "run": str(run.root),
            "artifact": str(run.path("bench", "w8a8-openvino-cpu")),
            "identity": "i" * 64,
            "subject": "a denoiser [of tests]",
            "bits": ("w8a8",),
            "machine": {"cpu": "A Processor", "cpu_flags": [], "threads": 2, "versions": {"torch": "2"}},
            "engine": "openvino",
            "coverage": coverage,
            "parity": parity,
            "contenders": [eager, contender],
            "speedup": speedup,
            "by_bits": {"w8a8": {**facts, "layers": [layer]}},
            "peak_tops": {"int8": 1.0},
            "headline": "W8A8 wins.",
        }
    )


@pytest.fixture
def benches(stages: FakeStages, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Configurations that the bench was called with; runs have no export here."""
    seen: list[Any] = []

    def run(config: Any, run: RunFolder, *, force: bool = False, reporter: Any = None) -> BenchRecord:
        seen.append(config)
        return record(run)

    def finished(config: Any, run: RunFolder) -> Artifact | None:
        return run.open("bench", "w8a8-openvino-cpu") if run.names("bench") else None

    def estimate(config: Any, run: RunFolder) -> Estimate:
        return Estimate(seconds=1, memory_mib=1, disk_mib=1)

    stage = SimpleNamespace(run=run, finished=finished, artifact_name=lambda config: "w8a8-x-cpu")
    _install(monkeypatch, "bench", stage)
    _install_estimate(monkeypatch, "bench", estimate)
    return seen


def test_flags_become_a_configuration(benches: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    words = "bench --model sd15-random --bits w8a8,w4a8 --batch-sizes 1,4 --size 32x48 --threads 2 --rounds 3"
    assert main([*words.split(), "--no-compiled", "--against", "nncf", "--dtype", "float32", "--json"]) == 0
    config = benches[0]
    assert [str(width) for width in config.bits] == ["w8a8", "w4a8"]
    assert (config.batch_sizes, config.size, config.threads, config.rounds) == ((1, 4), (32, 48), 2, 3)
    assert (config.compiled, config.against, config.dtype, config.pipeline) == (False, ("nncf",), "float32", False)
    result = json.loads(capsys.readouterr().out)
    assert result["run"].endswith("runs/sd15-random")
    assert result["speedup"]["vs_best_float"] == 1.6


def test_the_table_has_every_contender_and_ends_with_the_outcome(
    benches: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--model", "digits-sd"]) == 0
    text = capsys.readouterr().out
    assert "a denoiser [of tests]" in text
    assert "torch float32" in text
    assert "openvino w8a8" in text
    assert "rows/s at 4" in text
    assert "W8A8 wins." in text
    assert str(benches[0].bits[0]) == "w8a8", "without --bits"


@pytest.mark.parametrize(
    ("requirement", "code"), [("speedup.vs_best_float>=1.5", 0), ("speedup.vs_best_float>=1.7", 5)]
)
def test_a_speed_up_can_be_required(benches: list[Any], requirement: str, code: int) -> None:
    assert main(["bench", "--model", "digits-sd", "--require", requirement, "--quiet"]) == code


def test_a_dry_run_measures_nothing(benches: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--model", "digits-sd", "--dry-run", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["status"], about_anew(result)) == ("planned", [])
    assert result["artifact"] == "runs/digits-sd/bench/w8a8-x-cpu"
    assert benches == []


def about_anew(result: dict[str, Any]) -> list[str]:
    """Warnings of a result that will be replaced; a busy machine brings others."""
    return [warning for warning in result["warnings"] if warning.endswith("it will be built again.")]


def test_a_dry_run_says_what_would_be_measured_again(benches: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    model = ModelRef(id="digits-sd", fingerprint="f")
    with RunFolder(Path("runs/digits-sd")).build(
        BuildSpec("bench", "w8a8-openvino-cpu", {}, 0, (), model), False
    ) as build:
        build.commit()
    assert main(["bench", "--model", "digits-sd", "--dry-run", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["status"], result["estimate"]["seconds"]) == ("planned", 1.0), (
        "a bench measures whenever it is called"
    )
    (warning,) = about_anew(result)
    assert "runs/digits-sd/bench/w8a8-openvino-cpu exists with the same settings" in warning
    assert main(["bench", "--model", "digits-sd", "--dry-run", "--force", "--json"]) == 0
    assert about_anew(json.loads(capsys.readouterr().out)) == []
    assert benches == []


@pytest.mark.parametrize(
    "words",
    [
        "--batch-sizes 1,x",
        "--batch-sizes 0",
        "--size 3x",
        "--dtype int8",
        "--bits w9a8",
        "--roofline",
    ],
)
def test_what_cannot_be_is_a_usage_error(benches: list[Any], words: str) -> None:
    model = [] if words == "--roofline" else ["--model", "digits-sd"]
    assert main(["bench", *model, *words.split()]) == 2
    assert benches == []


def test_without_a_run_or_a_model_the_next_command_is_reported(
    benches: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench"]) == 3
    assert "hint: edadm collect" in capsys.readouterr().err


def test_no_gpu_is_one_sentence_and_exit_code_4(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["bench", "--model", "digits-sd", "--device", "cuda"]) == 4
    assert capsys.readouterr().err.startswith("error: There is no device 'cuda' on this machine")
    assert list(tmp_path.rglob("bench")) == []


def test_engines_are_listed_with_their_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["engines", "--json"]) == 0
    engines = {row["name"]: row for row in json.loads(capsys.readouterr().out)["engines"]}
    assert set(engines) == {"reference", "openvino", "cuda", "onnxruntime"}
    assert engines["openvino"]["refusals"]["cpu"] is None
    assert main(["engines"]) == 0
    assert "openvino" in capsys.readouterr().out


def test_rooflines_are_printed_without_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    assert main(["bench", "--roofline", "--model", "sd15", "--batch-sizes", "1,2", "--json"]) == 0
    tables = json.loads(capsys.readouterr().out)["rooflines"]
    assert set(tables) == {"1", "2"}
    assert 1 < tables["2"]["speedup"]["H200"]["w8a8"] < 2


def test_a_bench_is_named_by_what_it_measures_and_where() -> None:
    """By the stage itself, whose name a dry run reports."""
    assert STAGE.artifact_name(BenchConfig(bits="w8a8,w4a8", engine="reference", device="cpu")) == (
        "w8a8-w4a8-reference-cpu"
    )
    assert STAGE.artifact_name(BenchConfig(bits="w8a8", device="cpu")).endswith("-openvino-cpu")
