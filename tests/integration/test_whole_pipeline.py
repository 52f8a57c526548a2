"""What an export says of the whole pipeline: text encoders with 8-bit weights, sizes, and the measured factor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from edadm_cli import export, reconstruct
from edadm_cli.artifacts import CallTime, ExportRecord, RunFolder
from edadm_cli.config import BitWidth, ExportConfig, ReconstructConfig
from edadm_cli.errors import MachineError
from edadm_cli.export import building, timing
from edadm_cli.export.timing import _Pair, speed_sentences
from edadm_cli.models.loading import load_model
from edadm_cli.recipe import load_recipe

W8A8 = BitWidth.parse("w8a8")
CPU = torch.device("cpu")


@pytest.fixture
def run(selected: Callable[[Path], Path], few_blocks_sd: Path, tmp_path: Path) -> RunFolder:
    shutil.copytree(selected(few_blocks_sd), tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    reconstruct.STAGE.run(ReconstructConfig(bits=W8A8, recipe=load_recipe("rtn"), device="cpu"), folder)
    return folder


def _export(run: RunFolder, force: bool = False, **options: Any) -> ExportRecord:
    config = ExportConfig(bits=W8A8, device="cpu", parity_samples=1, **options)
    record = export.STAGE.run(config, run, force=force)
    assert isinstance(record, ExportRecord)
    return record


def test_an_export_with_8_bit_text_encoders_loads_and_says_what_that_changes(run: RunFolder) -> None:
    pytest.importorskip("torchao")
    plain = _export(run)
    record = _export(run, force=True, text_encoders="int8")
    assert record.identity != plain.identity
    encoder = record.text_encoders["text_encoder"]
    assert encoder.layers == 12
    assert encoder.rel_l2 is not None
    assert 0 < encoder.rel_l2 < 0.05
    assert record.pipeline is not None
    assert plain.pipeline is not None
    assert record.pipeline.memory_mib < plain.pipeline.memory_mib < plain.pipeline.memory_before_mib
    assert record.pipeline.memory_before_mib == pytest.approx(plain.pipeline.memory_before_mib)

    folder = Path(str(record.artifact))
    card = (folder / "README.md").read_text()
    assert "pip install edadm diffusers torchao" in card
    assert "8-bit weights in 12 linear layers" in card
    assert f"{record.pipeline.memory_mib:,.1f} MiB of weights loaded in float16" in card
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, dtype=torch.float16)
    assert type(pipeline.text_encoder.encoder.layers[0].mlp.fc1.weight).__name__ == "Int8Tensor"
    assert pipeline("one", num_inference_steps=1, output_type="np").images.shape[0] == 1
    files = sorted((folder / "text_encoder").iterdir())
    assert [path.name for path in files] == ["config.json", "model.safetensors"]

    content = bytearray(files[1].read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    scale = next(name for name in header if name.endswith("_scale"))
    place = 8 + int.from_bytes(content[:8], "little") + header[scale]["data_offsets"][0]
    content[place : place + 4] = torch.tensor(float("nan")).numpy().tobytes()
    files[1].write_bytes(bytes(content))
    with pytest.raises(Exception, match="not finite"):
        load_model(str(folder), CPU, torch.float32)


def test_the_export_and_full_precision_are_timed_on_the_engine_that_load_chooses(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(str(_export(run).artifact))
    monkeypatch.setattr(timing, "BUSY", 1e9)  # the machine that tests run on may be busy
    pair = _Pair(run.root, folder, "cpu")
    measured = pair.measure()
    times = iter([1.0] * 2 + [9.0, 1.0] * 9)
    monkeypatch.setattr(timing, "BUSY", 2.0)
    monkeypatch.setattr(pair, "_call", lambda _: next(times))
    assert pair.measure().factor == pytest.approx(1 / 9)
    times = iter([1.0] * 2 + [9.0, 1.0, 9.0, 1.0] + [9.0, 3.0] * 7)
    with pytest.raises(MachineError, match="other programs keep this machine busy"):
        pair.measure()
    assert (measured.engine, measured.dtype, measured.calls) == ("openvino", "float32", 9)
    assert measured.factor == pytest.approx(measured.full_precision_milliseconds / measured.milliseconds)
    assert measured.layers["int8"] > 20
    assert sum(measured.attention.values()) > 0


def test_the_verdict_says_whether_the_export_is_faster_or_why_nobody_knows(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {"engine": "openvino", "dtype": "float32", "milliseconds": 10.0, "calls": 9, "layers": {"int8": 83}}
    slow = CallTime(**times, full_precision_milliseconds=10.5, factor=1.05)
    fast = CallTime(**times, full_precision_milliseconds=20.0, factor=2.0)
    assert speed_sentences(slow)[0].startswith("The export is not faster on this machine")
    assert speed_sentences(fast)[0].startswith("The export is 2 times as fast on this machine")
    assert speed_sentences(fast)[1] == "The engine 'openvino' computes 83 layers in int8."
    attention = fast.model_copy(update={"attention": {"float32": 12}})
    assert speed_sentences(attention)[1] == (
        "The engine 'openvino' computes 83 layers in int8 and the products of 12 attentions in float32."
    )

    monkeypatch.setattr(building, "SMALLEST", 0)
    monkeypatch.setattr(building, "time_calls", lambda *_: slow)
    record = _export(run)
    assert record.call_time == slow
    assert record.verdict[-2:] == tuple(speed_sentences(slow))
    assert _export(run, force=True, measure=False).call_time is None

    def crash(*_: Any) -> CallTime:
        raise MachineError("The measurement of a few calls ended before its time: signal 11, crashed.")

    monkeypatch.setattr(building, "time_calls", crash)
    assert "signal 11" in _export(run, force=True).verdict[-1]


def test_what_does_not_fit_into_memory_twice_is_not_timed(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "SMALLEST", 0)
    monkeypatch.setattr(building, "time_calls", lambda *_: pytest.fail("full precision would be loaded"))
    monkeypatch.setattr(timing, "memory_of", lambda _: 2**10)
    record = _export(run)
    assert record.call_time is None
    assert record.verdict[-1].startswith("The speed was not measured: full precision and the export take")


def test_full_precision_is_timed_in_the_short_type_that_was_collected() -> None:
    cuda = torch.device("cuda")
    assert timing.element_type(CPU, torch.bfloat16) == torch.float32
    assert timing.element_type(cuda, torch.bfloat16) == torch.bfloat16
    assert timing.element_type(cuda, torch.float32) == torch.float16
    assert timing.memory_to_time(3, 10, CPU) == 23
    assert timing.memory_to_time(3, 10, cuda) == 13
