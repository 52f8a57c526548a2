"""The section about speed: every contender, the outcome, the layers, and no section where nothing was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edadm_cli.artifacts import BuildSpec, save_json
from edadm_cli.report.contents import read_run
from edadm_cli.report.page import render
from tests.unit.report.runs import RunMaker


def contender(name: str, engine: str, bits: str | None, median: float) -> dict[str, Any]:
    latency = {"median": median, "min": median - 1, "max": median + 2, "num_samples": 5}
    fields = {"name": name, "engine": engine, "dtype": "float32", "bits": bits, "compiled": False}
    sizes = {"peak_memory_mib": 512.0, "load_memory_mib": None, "load_seconds": 1.0, "size_mib": 13.0}
    return {**fields, **sizes, "latency_ms": latency, "throughput": {"1": 5.0, "4": 8.0}, "pipeline": None}


def bench() -> dict[str, Any]:
    parity = {"max_rel_l2": 2e-6, "bound": 1e-5, "layer": "mid.a", "layers_checked": 3, "layers": 3}
    parity |= {"prediction_rel_l2": 0.01, "prediction_bound": 0.05, "quantization_rel_l2": 0.1}
    speedup = {
        "contender": "openvino w4a8",
        "vs_fp32_eager": 8.0,
        "vs_best_float": 0.5,
        "best_float": "openvino float32",
    }
    kind = {"kind": "conv2d", "precision": "int8", "count": 3, "milliseconds": 4.0, "share": 1.0, "gmacs": 1.0}
    layers = [
        {"name": "mid.a", "kind": "conv2d", "planned": "w4a8", "precision": "int8", "reason": None},
        {"name": "mid.<b>", "kind": "linear", "planned": "w4a8", "precision": "float32", "reason": "too small"},
    ]
    return {
        "subject": "a denoiser",
        "bits": ["w4a8"],
        "machine": {
            "cpu": "A Processor",
            "threads": 2,
            "logical_cores": 4,
            "cpu_flags": ["avx2"],
            "versions": {"torch": "2"},
        },
        "engine": "openvino",
        "coverage": {"planned": 2, "quantized": 1, "kept": 0},
        "parity": parity,
        "contenders": [
            contender("torch float32", "torch", None, 160.0),
            contender("openvino w4a8", "openvino", "w4a8", 20.0),
            contender("openvino float32", "openvino", None, 10.0),
        ],
        "speedup": speedup,
        "by_bits": {
            "w4a8": {
                "coverage": {"planned": 2, "quantized": 1, "kept": 0},
                "parity": parity,
                "speedup": speedup,
                "layers": layers,
                "by_kind": [{**kind, "tops": 0.5, "percent_of_peak": 41.7}],
            }
        },
        "peak_tops": {"int8": 1.2},
        "headline": "W4A8 loses here: floating point is faster.",
    }


@pytest.fixture
def maker(tmp_path: Path) -> RunMaker:
    maker = RunMaker(tmp_path / "run")
    maker.calibration().width("w4a8")
    return maker


def measure(maker: RunMaker, name: str = "w4a8-openvino-cpu") -> None:
    config = {"bits": [{"weight": 4, "activation": 8}], "engine": "openvino", "device": "cpu", "threads": 2}
    config |= {"batch_sizes": [1, 4], "compiled": False}
    parents = (maker.run.open("export", "w4a8"),)
    with maker.run.build(BuildSpec("bench", name, config, 0, parents, maker.model)) as build:
        save_json(build.path / "bench.json", bench())
        build.commit(environment={"device": "cpu"})


def test_without_a_bench_there_is_no_section(maker: RunMaker) -> None:
    assert 'id="speed"' not in render(read_run(maker.run, None))


def test_every_contender_is_there_the_fastest_first_and_the_loss_is_said(maker: RunMaker) -> None:
    measure(maker)
    page = render(read_run(maker.run, None))
    section = page.split('id="speed"')[1].split("</section>")[0]
    assert "W4A8 loses here: floating point is faster." in section
    places = [section.index(f">{name}<") for name in ("openvino float32", "openvino w4a8", "torch float32")]
    assert places == sorted(places)
    assert "8.00\u00d7" in section
    assert "rows/s at 4" in section
    assert "mid.&lt;b&gt;" in section
    assert "too small" in section
    assert "42\u00a0%" in section


def test_the_command_that_measures_again_is_on_the_page(maker: RunMaker) -> None:
    measure(maker)
    page = render(read_run(maker.run, None))
    assert "edadm bench --bits w4a8 --batch-sizes 1,4 --no-compiled --engine openvino --device cpu --threads 2" in page


def test_a_bench_of_another_bit_width_is_left_out(maker: RunMaker) -> None:
    measure(maker)
    maker.width("w8a8")
    assert 'id="speed"' not in render(read_run(maker.run, ["w8a8"]))
    assert 'id="speed"' in render(read_run(maker.run, ["w4a8"]))
