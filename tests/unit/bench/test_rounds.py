"""Rounds, ratios, times by kind, coverage, and calls that are exchanged between processes."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edadm_cli.artifacts import Latency
from edadm_cli.bench.kinds import rows_by_kind
from edadm_cli.bench.quantized import coverage_of
from edadm_cli.bench.rounds import calls_of_turn, rotated, summarize, time_in_rounds
from edadm_cli.bench.spec import Call, placed
from edadm_cli.bench.subject import exchanged, sample_of
from edadm_cli.bench.verdict import headline, speedup_of
from edadm_cli.bench.workload import WorkItem
from edadm_cli.engines.base import LayerExecution, OperationTime
from edadm_cli.engines.isolation import pack, unpack
from edadm_cli.engines.reference import ReferenceEngine
from edadm_cli.errors import EdadmError
from tests.unit.bench.stand_ins import CPU, Clock, result


def test_turns_alternate_and_each_round_begins_with_another() -> None:
    log: list[str] = []
    contenders = {name: Clock(log, name, 500.0) for name in "abc"}
    times = time_in_rounds(contenders, 1, 3)
    assert log == [*"abc", *"bca", *"cab"]
    assert times == {name: [500.0] * 3 for name in "abc"}


def test_short_calls_fill_a_turn_and_the_first_of_it_does_not_count() -> None:
    contenders = {"a": Clock([], "a", 10.0)}
    assert calls_of_turn(10.0) == 20
    assert time_in_rounds(contenders, 1, 2)["a"] == [10.0] * 40
    assert calls_of_turn(0.0) == 50
    assert calls_of_turn(3000.0) == 1


def test_rotation_keeps_everyone() -> None:
    assert rotated("abc", 4) == ["b", "c", "a"]


def test_a_summary_is_the_median_with_its_spread() -> None:
    times = [5.0, 1.0, 9.0, 2.0]
    random.Random(0).shuffle(times)
    assert summarize(times) == Latency(median=3.5, min=1.0, max=9.0, num_samples=4)


def test_the_ratio_is_against_the_fastest_floating_point_whatever_runs_it() -> None:
    rows = [
        result("torch float32", 40.0),
        result("openvino float32", 10.0, engine="openvino"),
        result("openvino w8a8", 8.0, "w8a8", "openvino"),
        result("nncf w8a8", 4.0, "w8a8", "nncf"),
    ]
    actual = speedup_of(rows[2], rows)
    assert (actual.vs_fp32_eager, actual.vs_best_float, actual.best_float) == (5.0, 1.25, "openvino float32")
    text = headline([actual], rows, [rows[3]])
    assert "1.25 times as fast as the best floating point here (openvino float32)" in text
    assert "2.00 times slower than nncf w8a8" in text
    assert "loses" not in text


def test_a_loss_is_called_one() -> None:
    rows = [result("torch float32", 4.0), result("openvino w8a8", 8.0, "w8a8", "openvino")]
    text = headline([speedup_of(rows[1], rows)], rows, [])
    assert "W8A8 loses here" in text
    assert "2.00 times slower" in text


def test_without_the_baseline_there_is_no_ratio() -> None:
    with pytest.raises(EdadmError, match="full-precision contender"):
        speedup_of(result("openvino w8a8", 8.0, "w8a8"), [])


def test_time_by_kind_has_the_rate_and_the_share_of_the_peak() -> None:
    def item(name: str, kind: str, macs: int) -> WorkItem:
        return WorkItem(name, kind, 1, 1, 1, 1, macs, 1, 1, 1, True)

    work = [
        item("a", "conv3x3", 10**9),
        item("b.to_q", "attention_projection", 2 * 10**9),
        item("b", "self_attention", 10**9),
        item("c", "norm", 0),
    ]
    times = [
        OperationTime("a.part0", "conv2d", "int8", 3.0),
        OperationTime("a.part1", "conv2d", "int8", 1.0),
        OperationTime("b.to_q: gemm", "linear", "int8", 4.0),
        OperationTime("products", "attention", "float32", 1.0),
        OperationTime("c", "norm", "float32", 1.0),
        OperationTime("constant", "elementwise", "float32", 0.0),
    ]
    rows = {(row.kind, row.precision): row for row in rows_by_kind(times, work, {"int8": 1.0})}
    assert set(rows) == {("conv2d", "int8"), ("linear", "int8"), ("attention", "float32"), ("norm", "float32")}
    convolution = rows["conv2d", "int8"]
    assert (convolution.count, convolution.milliseconds, convolution.share) == (2, 4.0, 0.4)
    assert convolution.gmacs == 1.0, "two parts are one layer"
    assert convolution.tops == pytest.approx(0.5)
    assert convolution.percent_of_peak == pytest.approx(50)
    assert rows["linear", "int8"].tops == pytest.approx(1.0)
    assert rows["attention", "float32"].gmacs == 1.0
    assert rows["attention", "float32"].percent_of_peak is None, "no peak was measured in that precision"
    assert rows["norm", "float32"].gmacs is None


def test_a_planned_layer_in_floating_point_needs_a_reason() -> None:
    met = LayerExecution("a", "conv2d", "w8a8", "int8")
    kept = LayerExecution("b", "linear", "float", "float32")
    explained = LayerExecution("c", "linear", "w8a8", "float32", "too small")
    coverage, rows = coverage_of([met, kept, explained], ReferenceEngine())
    assert coverage.model_dump() == {"planned": 2, "quantized": 1, "kept": 1}
    assert [row.reason for row in rows] == [None, None, "too small"]
    with pytest.raises(EdadmError, match="runs the layer 'c' in float32 though it is planned as w8a8"):
        coverage_of([met, replace(explained, reason=None)], ReferenceEngine())


def test_calls_are_exchanged_and_placed_without_touching_the_original() -> None:
    class Network(nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor, added: Any = None) -> Tensor:
            return sample

    sample, noise = torch.zeros(2, 4), torch.ones(2, 4)
    call: Call = ((sample, torch.tensor(3)), {"added": {"ids": [sample, torch.zeros(2)]}})
    assert sample_of(Network(), call) is sample
    actual = exchanged(call, sample, noise)
    assert actual[0][0] is noise
    assert actual[1]["added"]["ids"][0] is noise
    assert call[0][0] is sample
    args, kwargs = placed(actual, CPU, torch.bfloat16)
    assert args[0].dtype == kwargs["added"]["ids"][0].dtype == torch.bfloat16
    assert args[1].dtype == torch.int64
    assert kwargs["added"]["ids"][1].dtype == torch.float32, "what has one dimension may be a timestep"


def test_calls_pass_between_processes_unchanged() -> None:
    call: Call = ((torch.randn(2, 3), torch.tensor(7)), {"flag": None, "nested": {"a": (torch.arange(3),)}})
    args, kwargs = unpack(pack(call))
    assert torch.equal(args[0], call[0][0])
    assert torch.equal(args[1], call[0][1])
    assert args[1].dtype == torch.int64
    assert kwargs["flag"] is None
    assert torch.equal(kwargs["nested"]["a"][0], torch.arange(3))
