"""Contenders: refusals of peers, what they compute, and what happens to one whose process is lost."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from edadm_cli.artifacts import Latency
from edadm_cli.bench.contenders import base
from edadm_cli.bench.contenders.base import Contender, Preparation
from edadm_cli.bench.contenders.float8 import Float8, Float8Linear
from edadm_cli.bench.contenders.nncf import Nncf
from edadm_cli.bench.contenders.registry import GROUP, peers, prepare_specs, require_peers
from edadm_cli.bench.contenders.sdnq import Sdnq
from edadm_cli.bench.contenders.torchao import TorchAo
from edadm_cli.bench.participants import Participants
from edadm_cli.bench.rounds import is_unsteady, time_in_rounds
from edadm_cli.bench.spec import Call, ContenderEnvironment, Spec
from edadm_cli.bench.worker import ContenderLostError
from edadm_cli.engines.isolation import reason_of
from edadm_cli.errors import EdadmError, InputError, MachineError, UsageError
from edadm_cli.progress import SilentReporter

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ALONE = ContenderEnvironment("cpu", 1, None, is_alone=True)
CALLS: dict[int, list[Call]] = {1: [((torch.randn(1, 4),), {})]}


@pytest.mark.parametrize(
    ("name", "device", "installed", "sentence", "code"),
    [
        ("nncf", CPU, False, "needs the package 'nncf'", 4),
        ("torchao", CPU, False, "needs the package 'torchao'", 4),
        ("sdnq", CUDA, False, "needs the package 'sdnq'", 4),
        ("comfy-kitchen", CUDA, False, "needs the package 'comfy-kitchen'", 4),
        ("nncf", CUDA, True, "compares on the CPU", 2),
        ("comfy-kitchen", CPU, True, "compares on a GPU", 2),
        ("float8", CPU, True, "compute capability 8.9 or later; this bench runs on the CPU", 4),
        ("float8", CUDA, True, "compute capability 8.9 or later; this GPU is older", 4),
        ("onnx", CPU, True, "--against takes nncf, torchao, sdnq, comfy-kitchen, float8", 2),
    ],
)
def test_a_peer_that_cannot_run_here_says_why_before_any_work(
    name: str, device: torch.device, installed: bool, sentence: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda package: object() if installed else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(EdadmError, match=sentence) as caught:
        require_peers([name], device)
    assert caught.value.exit_code == code


CRASHING = """
import os, signal
class Crash:
    @classmethod
    def from_pretrained(cls, folder, **options):
        os.kill(os.getpid(), signal.SIGSEGV)
"""


@pytest.mark.usefixtures("forked_processes")
def test_a_contender_that_crashes_is_left_out_and_only_a_required_one_ends_the_bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "crashing_contender.py").write_text(CRASHING)
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = Spec("torch float32", "torch", "torch", "float32", None, False, tmp_path, 1.0)
    spec = replace(spec, denoiser_class="crashing_contender.Crash")
    reporter = SilentReporter()
    participants = Participants(ALONE, CALLS, ["ours"], reporter)
    participants.start(spec, None)
    assert participants.left_out == {"torch float32": "signal 11, crashed"}
    assert list(reporter.warnings) == ["torch float32 is left out: signal 11, crashed."]
    assert list(participants) == []
    with pytest.raises(MachineError, match=r"process of 'torch float32' ended before its time: signal 11, crashed\."):
        Participants(ALONE, CALLS, ["torch float32"], reporter).start(spec, None)


def test_memory_is_named_as_the_reason_only_where_a_process_was_killed() -> None:
    assert "memory is used up" in reason_of(-9)
    assert ContenderLostError("x", -9).hint is not None
    assert reason_of(-6) == "signal 6, crashed"
    assert reason_of(3) == "exit code 3"
    assert ContenderLostError("x", -11).hint is None


def test_a_contender_lost_between_two_turns_costs_the_others_nothing() -> None:
    class Timed:
        def __init__(self, turns: int) -> None:
            self.turns = turns

        def warm_up(self, batch_size: int) -> float:
            return 500.0

        def time(self, batch_size: int, count: int) -> list[float]:
            self.turns -= 1
            if self.turns < 0:
                raise ContenderLostError("a", -11)
            return [500.0] * count

    lost: list[str] = []

    def attempt(name: str, call: object) -> object:
        try:
            return call()  # type: ignore[operator]
        except ContenderLostError:
            lost.append(name)
            return None

    times = time_in_rounds({"a": Timed(1), "b": Timed(9)}, 1, 3, attempt=attempt)
    assert lost == ["a"]
    assert times == {"b": [500.0] * 3}


@pytest.mark.parametrize(
    ("name", "engine"), [("torchao w8a8", "torchao"), ("torch float16", "torch"), ("openvino float32", "openvino")]
)
def test_an_error_of_a_contender_costs_that_contender_alone(name: str, engine: str) -> None:
    participants = Participants(replace(ALONE, is_alone=False), CALLS, ["ours"], SilentReporter())
    runs_on = "openvino" if engine == "openvino" else "torch"
    spec = Spec(name, engine, runs_on, "float32", None, False, Path("none"), 1.0, denoiser_class="no_such_module.Net")
    participants.start(spec, None)
    expected = "none holds no denoiser.xml" if engine == "openvino" else "No module named 'no_such_module'"
    assert expected in participants.left_out[name]
    with pytest.raises((ModuleNotFoundError, InputError)):
        participants.start(replace(spec, name="ours"), None)


@pytest.mark.parametrize(
    ("times", "unsteady"), [((6.45, 20.0, 528.0), True), ((10.0, 11.0, 40.0), False), ((10.0, 25.0, 40.0), True)]
)
def test_times_of_a_busy_machine_are_recognised(times: tuple[float, float, float], unsteady: bool) -> None:
    least, median, most = times
    assert is_unsteady(Latency(median=median, min=least, max=most, num_samples=9)) is unsteady


def test_a_float8_layer_is_within_the_error_of_its_codes() -> None:
    layer = nn.Linear(32, 48).requires_grad_(False)
    x = torch.randn(2, 5, 32)
    quantized = Float8Linear(layer, float(x.abs().max()))
    assert quantized.get_buffer("weight").dtype == torch.float8_e4m3fn
    y = quantized(x.bfloat16()).float()
    assert y.shape == (2, 5, 48)
    # e4m3 has 3 bits of mantissa: each factor is within 2^-4 of its value, and errors of a sum mostly cancel
    assert float((y - layer(x)).norm() / layer(x).norm()) < 2**-4


@pytest.fixture
def context(denoiser: nn.Module, tmp_path: Path) -> Preparation:
    denoiser.save_pretrained(tmp_path / "float")  # type: ignore[operator]
    states = torch.randn(1, 8, 16)
    call = ((torch.randn(1, 4, 8, 8), torch.tensor(5)), {"encoder_hidden_states": states})
    facts = base.DenoiserFacts.of(denoiser)
    return Preparation(facts, tmp_path / "float", tmp_path, [call], ALONE, "float32", None, compiled=False)


def test_float8_exchanges_the_layers_that_fit_and_keeps_the_prediction(
    context: Preparation, denoiser: nn.Module
) -> None:
    spec = Float8().prepare(context)[0]
    assert spec.size_mib < context.float_mib("float32")
    args, kwargs = context.calls[0]
    expected = denoiser(*args, **kwargs).sample
    quantized = Float8().quantized(context.denoiser(), spec, CPU)
    layers = [module for module in quantized.modules() if isinstance(module, Float8Linear)]
    assert layers
    prediction = quantized(*args, **kwargs).sample
    assert 0 < float((prediction - expected).norm() / expected.norm()) < 0.1


@pytest.mark.parametrize(("peer", "package"), [(TorchAo(), "torchao"), (Sdnq(), "sdnq")])
def test_a_peer_quantizes_as_its_users_would(
    peer: Contender, package: str, context: Preparation, denoiser: nn.Module
) -> None:
    pytest.importorskip(package)
    args, kwargs = context.calls[0]
    expected = denoiser(*args, **kwargs).sample
    for spec in peer.prepare(context):
        prediction = peer.quantized(context.denoiser(), spec, CPU)(*args, **kwargs).sample
        assert float((prediction - expected).norm() / expected.norm()) < 0.1


OUTSIDE = """
from edadm_cli.bench.contenders.base import Contender
class Idle(Contender):
    name = "idle"
    def prepare(self, context):
        return []
"""


def test_another_package_adds_a_contender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outside_contender.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = importlib.metadata.EntryPoint("idle", "outside_contender:Idle", GROUP)
    monkeypatch.setattr("edadm_cli.plugins.entry_points", lambda group: [entry])
    peers.cache_clear()
    try:
        require_peers(["idle"], CPU)
        with pytest.raises(UsageError, match="float8, idle; got 'other'"):
            require_peers(["other"], CPU)
        monkeypatch.setattr("edadm_cli.plugins.entry_points", lambda group: [replace_value(entry)])
        peers.cache_clear()
        with pytest.raises(MachineError, match=r"'idle' of the entry-point group .* cannot be loaded"):
            peers()
    finally:
        peers.cache_clear()
        sys.modules.pop("outside_contender", None)


def test_a_contender_that_prepares_something_else_is_named(context: Preparation) -> None:
    contender: Any = SimpleNamespace(name="idle", prepare=lambda context: None)
    with pytest.raises(MachineError, match=r"The contender 'idle' of the package types returned None, where a list of"):
        prepare_specs(contender, context)
    contender.prepare = lambda context: []
    assert prepare_specs(contender, context) == []


def replace_value(entry: importlib.metadata.EntryPoint) -> importlib.metadata.EntryPoint:
    return importlib.metadata.EntryPoint(entry.name, "outside_contender:Missing", entry.group)


def test_a_sum_of_weights_is_what_an_eight_bit_denoiser_saves(context: Preparation) -> None:
    num_weights = context.facts.linear_weights
    assert num_weights > 0
    saved = context.float_mib("float32") - context.eight_bit_mib("float32", num_weights)
    assert saved == pytest.approx(3 * num_weights / 2**20)


def test_nncf_sends_no_usage_reports(context: Preparation, monkeypatch: pytest.MonkeyPatch) -> None:
    class Imported(Exception):
        """Ends the preparation."""

    class Nowhere(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise Imported(os.environ.get("NNCF_CI"))

    monkeypatch.setenv("NNCF_CI", "")
    monkeypatch.delenv("NNCF_CI")
    monkeypatch.setitem(sys.modules, "nncf", Nowhere("nncf"))
    monkeypatch.setitem(sys.modules, "nncf.quantization", Nowhere("nncf.quantization"))
    monkeypatch.setitem(sys.modules, "nncf.quantization.advanced_parameters", Nowhere("advanced_parameters"))
    with pytest.raises(Imported, match="1"):
        Nncf().prepare(context)
