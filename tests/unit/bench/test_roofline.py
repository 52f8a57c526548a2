"""Rooflines: the formula by hand, and the ceiling of Stable Diffusion 1.5."""

from __future__ import annotations

import json
from io import StringIO

import pytest
from rich.console import Console

from edadm_cli.bench.roofline import DEVICES, DevicePeak, RooflineTable, model_rooflines, render_rooflines
from edadm_cli.bench.workload import FORMS, WorkItem

SLOW = DevicePeak("slow", fp16_tflops=1e-6, int8_tops=2e-6, bandwidth_gb_s=1e9)
NARROW = DevicePeak("narrow", fp16_tflops=1e9, int8_tops=2e9, bandwidth_gb_s=1e-6)


@pytest.fixture(scope="module")
def table() -> RooflineTable:
    return model_rooflines("sd15-random", batch_size=2)


def test_a_layer_takes_as_long_as_the_slower_of_arithmetic_and_memory() -> None:
    item = WorkItem("", "linear", 10, 10, 10, 1, 1000, 100, 100, 100, True)
    assert SLOW.milliseconds(item, "fp16") == pytest.approx(2.0)
    assert SLOW.milliseconds(item, "w8a8") == pytest.approx(1.0)
    assert NARROW.milliseconds(item, "fp16") == pytest.approx(620.0)
    assert NARROW.milliseconds(item, "w8a8") == pytest.approx(520.0)
    assert NARROW.milliseconds(item, "w4a8") == pytest.approx(470.0)


@pytest.mark.parametrize(
    ("device", "fp16", "w8a8"),
    [("H200", 1.97, 1.22), ("A100 40GB", 6.19, 3.84), ("RTX 3090", 24.0, 9.6), ("RTX 4090", 11.2, 5.3)],
)
def test_stable_diffusion_at_batch_two(table: RooflineTable, device: str, fp16: float, w8a8: float) -> None:
    """An independent count of the same bound, which also charged a few small copies: within 4%, and never above."""
    actual = table.milliseconds[device]
    assert 0.96 * fp16 < actual["fp16"] < fp16
    assert 0.96 * w8a8 < actual["w8a8"] < w8a8
    assert table.speedup[device]["w8a8"] == pytest.approx(actual["fp16"] / actual["w8a8"])


def test_sums_are_those_of_the_shapes(table: RooflineTable) -> None:
    for device in DEVICES:
        for form in FORMS:
            total = sum(row.count * row.microseconds[device.name][form] for row in table.shapes) / 1e3
            assert table.milliseconds[device.name][form] == pytest.approx(total)
    assert sum(row.count * row.macs for row in table.shapes) == sum(table.macs.values())


def test_integers_are_never_slower_and_gain_no_more_than_their_peak(table: RooflineTable) -> None:
    for device in DEVICES:
        allowed = table.speedup[device.name]
        most = max(device.int8_tops / device.fp16_tflops, 4)  # four: bytes of a weight at four bits
        assert 1 < allowed["w8a8"] <= allowed["w4a8"] < most


def test_attention_in_integers_raises_the_ceiling(table: RooflineTable) -> None:
    raised = model_rooflines("sd15", batch_size=2, attention_in_integers=True)
    assert raised.macs == table.macs
    for device in DEVICES:
        assert raised.speedup[device.name]["w8a8"] > table.speedup[device.name]["w8a8"]


def test_it_is_plain_data_and_a_table(table: RooflineTable) -> None:
    data = json.loads(json.dumps(table.to_json()))
    assert data["milliseconds"]["H200"]["fp16"] == table.milliseconds["H200"]["fp16"]
    assert len(data["shapes"]) == len(table.shapes)
    console = Console(width=250, file=StringIO())
    with console.capture() as capture:
        for part in render_rooflines(table):
            console.print(part)
    text = capture.get()
    assert all(device.name in text for device in DEVICES)
    assert "803.3" in text
