"""Engines through the whole chain on a tiny pipeline: files, images, quality, and a bench that refuses what is off."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor

import edadm_cli
from edadm_cli.artifacts import BenchRecord, RunFolder
from edadm_cli.artifacts.inspection import inspect_run
from edadm_cli.bench import measurement, participants, peak
from edadm_cli.bench import running as running_module
from edadm_cli.bench import stage as bench
from edadm_cli.bench.contenders.full_precision import OpenVinoFloat, TorchFloat
from edadm_cli.bench.request import BenchRequest
from edadm_cli.bench.spec import ContenderEnvironment, Spec
from edadm_cli.bench.subject import NearestSubject
from edadm_cli.bench.worker import ContenderLostError
from edadm_cli.config import BenchConfig, BitWidth, EvaluateConfig, ExportConfig, ReconstructConfig, SampleConfig
from edadm_cli.engines import registry
from edadm_cli.engines.base import EngineOptions
from edadm_cli.engines.openvino import OpenVinoEngine
from edadm_cli.engines.openvino.denoiser import OpenVinoDenoiser
from edadm_cli.engines.openvino.saturation import REASON, saturating_kinds
from edadm_cli.errors import EXIT_INTERNAL, EXIT_MACHINE, EdadmError, InputError, MachineError, UsageError
from edadm_cli.estimates import bench as bench_estimates
from edadm_cli.evaluate import stage as evaluate
from edadm_cli.export import stage as export
from edadm_cli.quant.layers import QuantizedLayer
from edadm_cli.recipe import load_recipe
from edadm_cli.reconstruct import stage as reconstruct
from edadm_cli.sample import stage as sample

W8A8, W4A8 = BitWidth.parse("w8a8"), BitWidth.parse("w4a8")

pytestmark = pytest.mark.usefixtures("forked_processes")


@pytest.fixture(scope="module")
def exported(selected: Callable[[Path], Path], few_blocks_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with exports of two bit widths; not to be changed."""
    root = tmp_path_factory.mktemp("bench") / "run"
    shutil.copytree(selected(few_blocks_sd), root)
    run = RunFolder(root)
    for bits in (W8A8, W4A8):
        reconstruct.run(ReconstructConfig(bits=bits, recipe=load_recipe("rtn"), device="cpu"), run)
        export.run(ExportConfig(bits=bits, device="cpu", parity_samples=1), run)
    return root


@pytest.fixture
def run(exported: Path, tmp_path: Path) -> RunFolder:
    shutil.copytree(exported, tmp_path / "run")
    return RunFolder(tmp_path / "run")


@pytest.fixture
def in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs contenders in this process: their times mean nothing, and no process has to start."""
    environment = ContenderEnvironment("cpu", 1, None, is_alone=False)
    monkeypatch.setattr(BenchRequest, "environment", property(lambda self: environment))
    monkeypatch.setitem(peak.SIZES, "cpu", peak.Sizes(linear=(16, 32, 32), convolution=(1, 8, 8)))


def config(**changes: Any) -> BenchConfig:
    fields: dict[str, Any] = {"bits": (W8A8,), "device": "cpu", "dtype": "float32", "threads": 1, "rounds": 1}
    return BenchConfig(**{**fields, "compiled": False, **changes})


def test_the_files_of_an_engine_are_an_artifact_of_their_own_and_are_made_again_when_damaged(run: RunFolder) -> None:
    before = run.open("export", "w8a8").identity
    settings = ExportConfig(bits=W8A8, device="cpu", parity_samples=1, engine="openvino")
    record = export.run(settings, run)
    assert record.status == "up_to_date", "the export itself has not changed"
    assert record.engine is not None
    artifact = run.open("engine", "w8a8-openvino")
    assert (record.engine.identity, record.engine.artifact) == (artifact.identity, str(artifact.path))
    assert [(parent.kind, parent.name, parent.identity) for parent in artifact.manifest.parents] == [
        ("export", "w8a8", before)
    ]
    made = artifact.manifest.created_at
    again = export.run(settings, run).engine
    assert again is not None
    assert run.open("engine", "w8a8-openvino").manifest.created_at == made
    assert [entry.kind for entry in inspect_run(run) if entry.kind == "engine" and entry.intact] == ["engine"]

    # damaged files are made again
    path = run.path("engine", "w8a8-openvino") / "denoiser.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="bytes") as caught:
        run.open("engine", "w8a8-openvino")
    assert str(caught.value.hint).startswith("edadm export --bits w8a8 --engine openvino")
    record = export.run(settings, run)
    assert "damaged" in record.warnings[0]
    assert run.open("engine", "w8a8-openvino")


def test_an_engine_without_files_is_refused_by_export(run: RunFolder) -> None:
    with pytest.raises(UsageError, match="keeps no files"):
        export.run(ExportConfig(bits=W8A8, device="cpu", parity_samples=1, engine="reference"), run)


CRASHING = """
import os, signal
from edadm_cli.engines.base import CompiledDenoiser
from edadm_cli.engines.openvino import OpenVinoEngine
class Crashing(CompiledDenoiser):
    layers = ()
    def __call__(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGSEGV)
    def profile(self, *args):
        return []
class CrashingEngine(OpenVinoEngine):
    name = "crashing"
    def load(self, folder, options):
        return Crashing()
"""


def test_a_library_that_crashes_at_the_first_call_is_an_error_and_leaves_no_files(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for an export outside of its run, which has no place for files."""
    (tmp_path / "crashing_engine.py").write_text(CRASHING)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(registry._ENGINES, "crashing", ("crashing_engine", "CrashingEngine"))
    first = "(?m)^The first call of the denoiser on the engine 'crashing'"
    sentence = rf"{first} ended before its time: signal 11, crashed\.$"
    with pytest.raises(MachineError, match=sentence) as caught:
        sample.run(SampleConfig(bits=W8A8, device="cpu", num_images=1, engine="crashing"), run)
    assert caught.value.exit_code == EXIT_MACHINE
    assert not run.has("engine", "w8a8-crashing")
    shutil.copytree(run.path("export", "w8a8"), tmp_path / "moved")
    with pytest.raises(MachineError, match=sentence):
        edadm_cli.load(tmp_path / "moved", engine="crashing", device="cpu")


def test_images_of_engines_lie_beside_each_other(run: RunFolder) -> None:
    names = []
    for engine in (None, "reference", "openvino"):
        settings = SampleConfig(bits=W8A8, device="cpu", num_images=1, engine=engine)
        record = sample.run(settings, run)
        assert sample.run(settings, run).status == "up_to_date"
        names.append(Path(record.images[0]).name)
    assert len(set(names)) == 3
    assert [name.rpartition("-")[2] for name in names[1:]] == ["reference.png", "openvino.png"]
    with pytest.raises(UsageError, match="cannot name another one"):
        sample.run(SampleConfig(bits=W8A8, device="cpu", engine="reference", arithmetic="integer"), run)


def test_quality_on_an_engine_is_an_evaluation_of_its_own(run: RunFolder) -> None:
    fields: dict[str, Any] = {"bits": W8A8, "device": "cpu", "num_images": 2, "batch_size": 2}
    plain = evaluate.run(EvaluateConfig(**fields), run)
    cached = evaluate.run(EvaluateConfig(**fields, cache="taylorseer:2"), run)
    integer = evaluate.run(EvaluateConfig(**fields, engine="openvino"), run)
    assert Path(str(integer.artifact)).name == "w8a8-openvino"
    assert plain.identity != integer.identity
    assert Path(str(cached.artifact)).name == "w8a8-taylorseer-2"
    assert cached.distance_to_full_precision.latent_rel_l2 != plain.distance_to_full_precision.latent_rel_l2
    assert integer.distance_to_full_precision.latent_rel_l2 == pytest.approx(
        plain.distance_to_full_precision.latent_rel_l2, rel=0.5
    )
    assert integer.skipped.keys() == plain.skipped.keys()
    assert "engine" not in run.open("evaluate", "w8a8").manifest.config, "older evaluations stay up to date"


@pytest.mark.usefixtures("in_one_process")
def test_a_bench_measures_every_contender_and_says_what_ran(run: RunFolder) -> None:
    record = bench.run(config(bits=(W8A8, W4A8), batch_sizes=(1, 2), rounds=2), run)
    assert record.status == "done"
    assert record.bits == ("w8a8", "w4a8")
    names = [contender.name for contender in record.contenders]
    assert "torch float32" in names
    assert "openvino float32" in names, "the engine's own merits are not taken for those of integers"
    assert names[-2:] == ["openvino w8a8", "openvino w4a8"]
    for contender in record.contenders:
        latency = contender.latency_ms
        assert 0 < latency.min <= latency.median <= latency.max
        assert set(contender.throughput) == {"1", "2"}
        assert contender.peak_memory_mib is None, "not measured where contenders share a process"
    assert record.parity == record.by_bits["w8a8"].parity
    assert record.parity.max_rel_l2 <= record.parity.bound == OpenVinoEngine.layer_bound
    assert record.parity.prediction_rel_l2 <= record.parity.prediction_bound
    for facts in record.by_bits.values():
        assert facts.coverage.planned == sum(row.planned != "float" for row in facts.layers)
        # on a processor that cannot sum wide weights exactly in bytes, those layers are in floating point and say so
        spared = sum(row.reason == REASON for row in facts.layers)
        assert not spared or saturating_kinds()
        assert facts.coverage.quantized >= 0.8 * (facts.coverage.planned - spared)
        assert all(row.precision == "int8" or row.reason for row in facts.layers if row.planned != "float")
        assert sum(row.share for row in facts.by_kind) == pytest.approx(1)
        precision = "int8" if facts.coverage.quantized else "float32"
        products = [row for row in facts.by_kind if row.kind == "conv2d" and row.precision == precision]
        assert products[0].gmacs is not None
        assert products[0].percent_of_peak is not None
    by_name = {contender.name: contender.latency_ms.median for contender in record.contenders}
    ratio = by_name["torch float32"] / by_name["openvino w8a8"]
    assert record.speedup.vs_fp32_eager == pytest.approx(ratio)
    assert record.speedup.vs_best_float == pytest.approx(by_name[record.speedup.best_float] / by_name["openvino w8a8"])
    artifact = run.open("bench", "w8a8-w4a8-openvino-cpu")
    assert [parent.name for parent in artifact.manifest.parents] == ["w8a8", "w4a8"]
    assert {entry.path for entry in artifact.manifest.payload} == {"bench.json", "bench.png"}
    assert "machine" not in artifact.manifest.config
    assert json.loads((artifact.path / "bench.json").read_text())["headline"] == record.headline


@pytest.fixture
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the contenders of OpenVINO at full precision, which take most of a bench's time to convert."""
    monkeypatch.setattr(measurement, "FLOATS", (TorchFloat(),))


@pytest.mark.usefixtures("in_one_process", "torch_alone")
def test_the_same_bench_measures_again_and_another_needs_force(run: RunFolder) -> None:
    # the reference: of all engines it has least to compile
    assert bench.finished(config(engine="reference"), run) is None
    first = bench.run(config(engine="reference"), run)
    there = bench.finished(config(engine="reference"), run)
    assert there is not None
    assert there.identity == first.identity
    again = bench.run(config(engine="reference"), run)
    assert again.status == "done"
    assert first.identity == again.identity
    assert [c.latency_ms for c in first.contenders] != [c.latency_ms for c in again.contenders]
    with pytest.raises(InputError, match="other settings") as caught:
        bench.run(config(engine="reference", size=(16, 16)), run)
    assert "--force" in str(caught.value.hint)
    with pytest.raises(InputError, match="other settings"):
        bench.finished(config(engine="reference", size=(16, 16)), run)
    assert bench.run(config(engine="reference", size=(16, 16)), run, force=True).identity != first.identity


@pytest.mark.usefixtures("in_one_process", "torch_alone")
def test_algorithms_are_tried_for_what_is_timed_and_nothing_else(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN's search takes memory and changes last bits, so the reference runs without it."""
    seen: dict[str, set[bool]] = {}

    def record(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            seen.setdefault(name, set()).add(torch.backends.cudnn.benchmark)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, recorded)

    record(QuantizedLayer, "forward")
    record(measurement, "check_prediction")
    record(measurement, "coverage_of")
    record(running_module, "milliseconds")
    record(OpenVinoDenoiser, "__call__")
    bench.run(config(), run)
    assert seen == {
        "forward": {False},
        "check_prediction": {False},
        "coverage_of": {False},
        "milliseconds": {True},
        "__call__": {True},
    }
    assert not torch.backends.cudnn.benchmark


@pytest.mark.usefixtures("in_one_process", "torch_alone")
def test_whole_images_are_timed_on_request(run: RunFolder) -> None:
    record = bench.run(config(pipeline=True, cache="taylorseer:2"), run)
    cached = {contender.engine: contender.pipeline.cache for contender in record.contenders if contender.pipeline}
    assert cached == {"torch": "taylorseer:2", "openvino": None}
    assert any("without the cache: The engine runs each step as one graph" in text for text in record.warnings)
    for contender in record.contenders:
        assert contender.pipeline is not None
        assert contender.pipeline.num_steps == 3
        assert 0 < contender.pipeline.denoiser_share < 1


@pytest.mark.usefixtures("in_one_process")
def test_nothing_is_timed_when_a_layer_is_off(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_layer = OpenVinoEngine.compile_layer

    def skewed(self: OpenVinoEngine, layer: QuantizedLayer, x: Tensor, options: EngineOptions) -> Any:
        made = compile_layer(self, layer, x, options)
        return (lambda x: made(x) * 1.01) if x.ndim == 4 else made

    monkeypatch.setattr(OpenVinoEngine, "compile_layer", skewed)
    monkeypatch.setattr("edadm_cli.bench.participants.time_in_rounds", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(EdadmError, match=r"'[\w.]+' is off by 1\.0\de-02 .* the bound is") as caught:
        bench.run(config(), run)
    assert caught.value.exit_code == EXIT_INTERNAL
    assert not run.has("bench", "w8a8-openvino-cpu")
    assert not list(run.root.glob("bench/*/scratch")), "nothing of it stays on disk"


@pytest.mark.usefixtures("in_one_process")
def test_nothing_is_timed_when_the_prediction_is_off(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    call = OpenVinoDenoiser.__call__

    def skewed(self: OpenVinoDenoiser, *args: Any, **kwargs: Any) -> Any:
        return (3 * call(self, *args, **kwargs)[0],)

    monkeypatch.setattr(OpenVinoDenoiser, "__call__", skewed)
    with pytest.raises(EdadmError, match="its prediction is off by"):
        bench.run(config(), run)


@pytest.mark.usefixtures("in_one_process")
def test_a_model_is_measured_without_a_run_and_without_a_contender_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*ignored: Any) -> None:
        raise EdadmError("OpenVINO cannot convert it")

    monkeypatch.setattr(OpenVinoFloat, "prepare", refused)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4, **blocks)
    DDIMPipeline(unet=unet, scheduler=DDIMScheduler()).save_pretrained(tmp_path / "model")
    run = RunFolder(tmp_path / "run")
    record: BenchRecord = bench.run(config(model=str(tmp_path / "model"), bits=(W4A8,), engine="onnxruntime"), run)
    assert "rounded to nearest" in record.subject
    assert run.open("bench", "w4a8-onnxruntime-cpu").manifest.parents == ()
    assert record.engine == "onnxruntime"
    assert sum(record.part_seconds.values()) < record.seconds
    assert record.left_out == {"openvino": "OpenVINO cannot convert it"}
    assert "Left out: openvino (OpenVINO cannot convert it)." in record.headline


def test_an_estimate_writes_nothing(run: RunFolder) -> None:
    before = sorted(path for path in run.root.rglob("*"))
    assert bench_estimates.estimate(config(), run).seconds > 0
    assert sorted(path for path in run.root.rglob("*")) == before


@pytest.mark.usefixtures("in_one_process")
def test_a_contender_that_crashes_leaves_the_results_of_the_others(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = participants.Running

    def crashing(spec: Spec, *arguments: Any) -> Any:
        if spec.name == "openvino float32":
            raise ContenderLostError(spec.name, -11)
        return started(spec, *arguments)

    monkeypatch.setattr(participants, "Running", crashing)
    record = bench.run(config(engine="reference"), run)
    assert record.left_out == {"openvino float32": "signal 11, crashed"}
    names = [contender.name for contender in record.contenders]
    assert {"torch float32", "reference w8a8"} <= set(names)
    assert "openvino float32" not in names
    assert "Left out: openvino float32 (signal 11, crashed)." in record.headline
    assert record.speedup.best_float in names


class CustomUNet(UNet2DModel):
    """A class that diffusers does not have, as those of latent-diffusion models are."""


@pytest.mark.usefixtures("in_one_process")
def test_a_denoiser_whose_class_is_not_one_of_diffusers_is_measured(tmp_path: Path, monkeypatch: Any) -> None:
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    options: dict[str, Any] = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "norm_num_groups": 4, **blocks}
    unet = CustomUNet(layers_per_block=1, **options).eval().requires_grad_(False)
    monkeypatch.setattr(NearestSubject, "full_precision", lambda self: unet)
    DDIMPipeline(unet=UNet2DModel(layers_per_block=1, **options), scheduler=DDIMScheduler()).save_pretrained(
        tmp_path / "model"
    )
    record = bench.run(config(model=str(tmp_path / "model"), engine="reference"), RunFolder(tmp_path / "run"))
    assert record.contenders[0].name == "torch float32"


@pytest.mark.usefixtures("in_one_process")
def test_a_size_that_the_denoiser_cannot_take_is_bad_input(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_small(*_: Any) -> Any:
        raise RuntimeError("Output size is too small")

    monkeypatch.setattr(measurement, "workload", too_small)
    with pytest.raises(InputError, match=r"cannot be called with a sample of shape \(1, 4, 1, 1\): Output size is too"):
        bench.run(config(size=(1, 1)), run)
