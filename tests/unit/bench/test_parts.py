"""The parts of a bench: rounds, ratios, profiles, coverage, and CUDA graphs and events with stand-ins."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edadm_cli.artifacts import Contender, Latency
from edadm_cli.bench import machine, memory
from edadm_cli.bench import running as running_module
from edadm_cli.bench.algorithms import choose_algorithms
from edadm_cli.bench.contenders import base
from edadm_cli.bench.contenders.base import DenoiserFacts, Preparation, torch_function
from edadm_cli.bench.contenders.full_precision import TorchFloat
from edadm_cli.bench.contenders.registry import require_peers
from edadm_cli.bench.kinds import rows_by_kind
from edadm_cli.bench.memory import PeakMemory
from edadm_cli.bench.peak import Sizes, measure_peaks
from edadm_cli.bench.quantized import coverage_of
from edadm_cli.bench.rounds import calls_of_turn, rotated, summarize, time_in_rounds
from edadm_cli.bench.running import Running
from edadm_cli.bench.spec import Call, ContenderEnvironment, Spec, milliseconds, placed
from edadm_cli.bench.subject import exchanged, sample_of
from edadm_cli.bench.verdict import headline, speedup_of
from edadm_cli.bench.worker import RemoteRunning
from edadm_cli.bench.workload import WorkItem
from edadm_cli.engines.base import EngineOptions, LayerExecution, OperationTime
from edadm_cli.engines.isolation import pack, unpack
from edadm_cli.engines.reference import ReferenceEngine
from edadm_cli.errors import EdadmError, MachineError, UsageError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ALONE, TOGETHER = (
    ContenderEnvironment("cpu", 1, None, is_alone=True),
    ContenderEnvironment("cpu", 1, None, is_alone=False),
)


def call_of(seed: int = 0) -> Call:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(1, 8, 16, generator=generator)
    return (torch.randn(1, 4, 8, 8, generator=generator), torch.tensor(5)), {"encoder_hidden_states": states}


def preparation(
    denoiser: nn.Module, folder: Path, device: torch.device, half: str | None, compiled: bool = False
) -> Preparation:
    return Preparation(
        facts=DenoiserFacts.of(denoiser),
        denoiser_folder=folder / "float",
        scratch=folder,
        calls=[call_of(seed) for seed in range(2)],
        environment=replace(TOGETHER, device=str(device)),
        dtype=half or "float32",
        half=half,
        compiled=compiled,
    )


def result(name: str, median: float, bits: str | None = None, engine: str = "torch") -> Contender:
    return Contender(
        name=name,
        engine=engine,
        dtype="float32",
        bits=bits,
        compiled=False,
        latency_ms=Latency(median=median, min=median, max=median, num_samples=1),
        peak_memory_mib=None,
        load_memory_mib=None,
        load_seconds=1.0,
        size_mib=1.0,
        throughput={"1": 1000 / median},
    )


class Clock:
    """A contender whose calls take a given time."""

    def __init__(self, log: list[str], name: str, call_ms: float) -> None:
        self.log, self.name, self.call_ms = log, name, call_ms

    def warm_up(self, batch_size: int) -> float:
        return self.call_ms

    def time(self, batch_size: int, count: int) -> list[float]:
        self.log.append(self.name)
        return [100.0, *[self.call_ms] * (count - 1)] if count > 1 else [self.call_ms]


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


@pytest.fixture
def saved(denoiser: nn.Module, tmp_path: Path) -> Spec:
    denoiser.save_pretrained(tmp_path / "float")  # type: ignore[operator]
    return TorchFloat().prepare(preparation(denoiser, tmp_path, CPU, "bfloat16"))[0]


def test_a_contender_in_a_process_of_its_own_computes_the_same(saved: Spec, denoiser: nn.Module) -> None:
    calls = {1: [call_of(seed) for seed in range(2)]}
    remote = RemoteRunning(saved, ALONE, calls)
    try:
        here = Running(saved, TOGETHER, calls)
        assert torch.allclose(remote.prediction, here.prediction, atol=1e-6)
        assert torch.allclose(here.prediction, denoiser(*calls[1][0][0], **calls[1][0][1]).sample, atol=1e-6)
        assert remote.warm_up(1) > 0
        assert len(remote.time(1, 3)) == 3
        running, loading = remote.memory()
        assert running is not None
        assert loading is not None
        assert 100 < running < 4000, "MiB of a process with torch in it"
        assert here.memory() == (None, None)
        with pytest.raises(EdadmError, match="KeyError"):
            remote.time(7, 1)
    finally:
        remote.close()
    with pytest.raises(MachineError, match=r"process of 'torch float32' ended before its time: exit code 0"):
        remote.time(1, 1)


REMARKING = """
import logging
from multiprocessing import Pipe
from edadm_cli.engines import isolation
def remarking(*arguments):
    logging.getLogger("torch.utils.cpp_extension").warning("of CUDA's compiler")
    logging.getLogger("torch").warning("of something else")
    raise KeyError("that ends it")
ours, theirs = Pipe()
isolation._serve(theirs, remarking)
"""


def test_a_process_does_not_tell_of_the_gpu_that_it_was_not_to_use() -> None:
    done = subprocess.run([sys.executable, "-c", REMARKING], capture_output=True, text=True, check=True)
    assert "of something else" in done.stderr
    assert "of CUDA's compiler" not in done.stderr


def test_a_contender_that_cannot_be_loaded_says_why(saved: Spec, tmp_path: Path) -> None:
    broken = replace(saved, runs_on="openvino", engine="openvino", folder=tmp_path / "nothing")
    with pytest.raises(EdadmError, match=r"no denoiser\.xml") as caught:
        RemoteRunning(broken, ALONE, {1: [call_of()]})
    assert caught.value.exit_code == 3


def test_the_contenders_on_cuda_are_those_that_a_sceptic_asks_for(denoiser: nn.Module, tmp_path: Path) -> None:
    specs = TorchFloat().prepare(preparation(denoiser, tmp_path, CUDA, "float16", compiled=True))
    assert [(spec.name, spec.compiled, spec.graphs, spec.channels_last) for spec in specs] == [
        ("torch float32", False, False, False),
        ("torch float16", False, False, True),
        ("torch float16, CUDA graph", False, True, True),
        ("torch float16, compiled, CUDA graph", True, True, True),
    ]
    assert specs[1].size_mib == specs[0].size_mib / 2
    on_old_cpu = TorchFloat().prepare(preparation(denoiser, tmp_path, CPU, None, compiled=True))
    assert [spec.name for spec in on_old_cpu] == ["torch float32", "torch float32, compiled"]


def test_half_precision_is_channels_last_compiled_and_graphed(
    denoiser: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def compile_(module: Any, **options: Any) -> Any:
        asked.append(options)
        return lambda *args, **kwargs: module(*args, **kwargs)

    class Graph:
        def __init__(self, function: Any) -> None:
            self.function = function

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.function(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr("edadm_cli.bench.contenders.base.GraphedFunction", Graph)
    args, kwargs = call_of()
    expected = denoiser(*args, **kwargs).sample
    spec = Spec("x", "torch", "torch", "float16", None, True, None, 1.0, graphs=True, channels_last=True)
    function = torch_function(denoiser, spec, replace(TOGETHER, compile_mode="max-autotune-no-cudagraphs"))
    assert isinstance(function, Graph)
    assert asked == [{"dynamic": False, "mode": "max-autotune-no-cudagraphs"}]
    assert denoiser.get_submodule("conv_in").weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[operator]
    assert torch.allclose(function(*args, **kwargs).sample, expected, atol=1e-5)


def test_on_cuda_time_is_that_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.name = f"event {len([entry for entry in log if entry == 'made'])}"
            log.append("made")

        def record(self) -> None:
            log.append(self.name)

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, other: Event) -> float:
            return 1.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert milliseconds(lambda: log.append("call"), CUDA) == 1.5
    assert log == ["made", "made", "event 0", "call", "event 1", "wait"]


def test_a_tensor_that_calls_share_is_one_tensor_on_the_device() -> None:
    sample, states = torch.randn(2, 3), torch.randn(2, 3)
    calls = [((sample,), {"states": states}), ((torch.randn(2, 3),), {"states": states})]
    first, second = placed(calls, CPU, torch.float16)
    assert first[1]["states"] is second[1]["states"], "an engine may keep what it computed of the prompt"
    assert first[1]["states"].dtype == torch.float16
    assert first[0][0] is not second[0][0]


def test_on_cuda_memory_is_counted_from_before_the_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100 * 2**20)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 350 * 2**20)
    assert PeakMemory(CUDA, is_alone=False).peak_mib() == 250.0


def test_a_contender_that_memory_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_mib", lambda: 4000.0)
    memory.require_memory("a small one", 1000.0)
    with pytest.raises(MachineError, match=r"'torch float32' needs about 5,\d\d\d MiB .* 4,000 MiB are left"):
        memory.require_memory("torch float32", 3400.0)
    monkeypatch.setattr(memory, "available_mib", lambda: None)
    memory.require_memory("torch float32", 3400.0)


def test_the_memory_that_is_left_is_told() -> None:
    memory.give_back_memory()
    actual = memory.available_mib()
    assert actual is not None
    assert actual > 10


def test_torchs_allocator_gives_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    memory.give_back_memory()
    assert emptied == [], "no GPU was used"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    memory.give_back_memory()
    assert emptied == [True]


class Card:
    """A card of 80 GiB, of which the process has 10, and 72 at most."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fraction = 0.9
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", self.limited)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", self.limit)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 * 2**30)
        properties = SimpleNamespace(total_memory=80 * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def limited(self, device: int) -> float:
        assert device == 3, "torch wants an index, and 'cuda' is the current device"
        return self.fraction

    def limit(self, fraction: float, device: int) -> None:
        assert device == 3
        self.fraction = fraction


@pytest.mark.parametrize("fits", [True, False])
def test_algorithms_are_tried_within_bounds_of_memory(monkeypatch: pytest.MonkeyPatch, fits: bool) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    card, limits = Card(monkeypatch), list[float]()

    def call() -> str:
        assert torch.backends.cudnn.benchmark
        limits.append(card.fraction)
        if not fits and len(limits) == 1:
            raise torch.OutOfMemoryError
        return "a prediction"

    assert choose_algorithms(call, CUDA) == "a prediction"
    assert limits == ([18 / 80] if fits else [18 / 80, 0.9]), "what the process has and eight GiB; then all it may have"
    assert card.fraction == 0.9
    assert not torch.backends.cudnn.benchmark
    monkeypatch.undo()
    assert choose_algorithms(lambda: torch.backends.cudnn.benchmark, CPU)


def test_algorithms_are_chosen_once_a_size_before_anything_counts(
    saved: Spec, denoiser: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    running = Running(saved, TOGETHER, {1: [call_of()], 2: [call_of()]})
    monkeypatch.setattr(running_module, "choose_algorithms", lambda call, device: chosen.append(len(chosen)))
    monkeypatch.setattr(running_module, "milliseconds", lambda call, device: 1.0)
    running.warm_up(1)
    assert chosen == [], "on a CPU there is nothing to choose"
    monkeypatch.setattr(running, "_device", CUDA)
    for batch_size in (1, 2, 2, 1):
        running.warm_up(batch_size)
    assert chosen == [0, 1]


@pytest.mark.parametrize("in_a_row", [1, 3])
def test_peaks_are_measured_in_each_precision(in_a_row: int) -> None:
    sizes = Sizes(linear=(4, 8, 8), convolution=(2, 4, 5), in_a_row=in_a_row)
    peaks = measure_peaks(ReferenceEngine(), EngineOptions(CPU), ("float32", "bfloat16"), sizes)
    assert set(peaks) == {"int8", "float32", "bfloat16"}
    assert all(rate > 0 for rate in peaks.values())


def test_the_facts_of_the_machine_are_plain_data() -> None:
    facts = machine.machine_facts(CPU, 3)
    assert facts["threads"] == 3
    assert facts["cpu"]
    assert 1 <= machine.physical_cores() <= (facts["logical_cores"] or 1)
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0] or "torch" in facts["versions"]
    assert "gpu" not in facts


def test_bfloat16_is_fast_where_the_processor_has_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_flags", lambda: ["avx2", "avx512_bf16"])
    assert machine.has_fast_bfloat16(CPU)
    assert not machine.has_fast_bfloat16(CUDA)
    monkeypatch.setattr(machine, "cpu_flags", lambda: ["avx2", "avx512_vnni"])
    assert not machine.has_fast_bfloat16(CPU)


def test_a_peer_that_is_not_installed_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match="--against nncf needs the package 'nncf'") as caught:
        require_peers(["nncf"], CPU)
    assert caught.value.exit_code == 4
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: object())
    require_peers(["nncf", "torchao"], CPU)
    with pytest.raises(UsageError, match="on the CPU"):
        require_peers(["nncf"], CUDA)


def test_calls_of_a_contender_go_through_its_inputs_in_turn(saved: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def function(sample: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        seen.append(float(sample.flatten()[0]))
        return (sample,)

    monkeypatch.setattr(running_module, "load", lambda spec, environment: function)
    calls = {1: [call_of(seed) for seed in range(3)]}
    running = Running(saved, TOGETHER, calls)
    seen.clear()
    running.time(1, 6)
    firsts = [float(call[0][0].flatten()[0]) for call in calls[1]]
    assert sorted(set(seen)) == sorted(firsts)
    assert seen[:3] == seen[3:]
