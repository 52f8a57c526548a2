"""What a bench does on CUDA, with stand-ins for events, memory and algorithms; peaks and facts of the machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from edadm_cli.bench import machine, memory
from edadm_cli.bench import running as running_module
from edadm_cli.bench.algorithms import choose_algorithms
from edadm_cli.bench.contenders import base
from edadm_cli.bench.contenders.base import torch_function
from edadm_cli.bench.contenders.full_precision import TorchFloat
from edadm_cli.bench.contenders.registry import require_peers
from edadm_cli.bench.memory import PeakMemory
from edadm_cli.bench.peak import Sizes, measure_peaks
from edadm_cli.bench.running import Running
from edadm_cli.bench.spec import Spec, milliseconds, placed
from edadm_cli.engines.base import EngineOptions
from edadm_cli.engines.reference import ReferenceEngine
from edadm_cli.errors import MachineError, UsageError
from tests.unit.bench.stand_ins import CPU, CUDA, TOGETHER, call_of, preparation


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


def test_the_memory_that_is_left_is_reported() -> None:
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
