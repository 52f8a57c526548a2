"""Contenders in separate processes."""

from __future__ import annotations

import multiprocessing
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edadm_cli.bench import running as running_module
from edadm_cli.bench.running import Running
from edadm_cli.bench.spec import Spec
from edadm_cli.bench.worker import RemoteRunning
from edadm_cli.engines import isolation
from edadm_cli.errors import EdadmError, MachineError
from tests.integration.fresh_interpreter import FreshInterpreter
from tests.unit.bench.stand_ins import ALONE, TOGETHER, call_of


def test_a_contender_in_a_process_of_its_own_computes_the_same(
    saved: Spec, denoiser: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "_PATIENCE_S", 60)  # a busy machine ends a process slowly
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


class _Recorder:
    """A denoiser that an engine compiled in this process; it notes the types of its inputs."""

    def __init__(self) -> None:
        self.dtypes: set[torch.dtype] = set()

    def __call__(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        self.dtypes |= {sample.dtype, encoder_hidden_states.dtype}
        return (sample,)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_without_files_gets_inputs_in_the_type_of_what_is_not_quantized(dtype: str) -> None:
    spec = Spec("toy w8a8", "toy", "toy", dtype, "w8a8", compiled=True, folder=None, size_mib=1.0)
    compiled: Any = _Recorder()
    Running(spec, TOGETHER, {1: [call_of()]}, lambda: compiled)
    assert compiled.dtypes == {getattr(torch, dtype)}


REMARKING = """
import logging, os, sys
os.dup2(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT), 2)
from multiprocessing import Pipe
from edadm_cli.engines import isolation
def remarking(*arguments):
    logging.getLogger("torch.utils.cpp_extension").warning("of CUDA's compiler")
    logging.getLogger("torch").warning("of something else")
    raise KeyError("that ends it")
ours, theirs = Pipe()
isolation._serve(theirs, remarking)
"""


def test_a_process_does_not_tell_of_the_gpu_that_it_was_not_to_use(
    fresh_interpreter: FreshInterpreter, tmp_path: Path
) -> None:
    assert fresh_interpreter.run(REMARKING, tmp_path / "stderr") == 0
    said = (tmp_path / "stderr").read_text()
    assert "of something else" in said
    assert "of CUDA's compiler" not in said


def test_a_process_begins_with_interrupts_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt of its imports would write a traceback; `_serve` takes interrupts once they are done."""

    def held_back() -> set[int]:
        return signal.pthread_sigmask(signal.SIG_BLOCK, [])

    at_start: list[set[int]] = []
    process = SimpleNamespace(start=lambda: at_start.append(held_back()), kill=lambda: None, join=lambda timeout: None)
    process.is_alive = lambda: False
    ours, theirs = multiprocessing.Pipe()
    theirs.send(("done", None))
    context = SimpleNamespace(Pipe=lambda: (ours, theirs), Process=lambda **_: process)
    monkeypatch.setattr(isolation, "multiprocessing", SimpleNamespace(get_context=lambda _: context))
    isolation.IsolatedProcess(lambda status: EdadmError("lost"), dict).close()
    assert signal.SIGINT in at_start[0]
    assert signal.SIGINT not in held_back()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(isolation, "_write_to_stderr", lambda: None)
    try:
        ends = multiprocessing.Pipe()
        isolation._serve(ends[1], _fail)
        assert signal.SIGINT not in held_back()
    finally:
        signal.signal(signal.SIGINT, before)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _fail() -> None:
    raise EdadmError("no")


@pytest.mark.usefixtures("forked_processes")
def test_a_contender_that_cannot_be_loaded_says_why(saved: Spec, tmp_path: Path) -> None:
    broken = replace(saved, runs_on="openvino", engine="openvino", folder=tmp_path / "nothing")
    with pytest.raises(EdadmError, match=r"no denoiser\.xml") as caught:
        RemoteRunning(broken, ALONE, {1: [call_of()]})
    assert caught.value.exit_code == 3


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
