"""A team of processes, played by threads with one store: they meet, exchange values, report failures, miss the dead."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import HashStore

from edadm_cli import processes
from edadm_cli.errors import InputError, MachineError
from edadm_cli.processes import ALONE, LostProcessError, Team, join


def play(parts: list[Callable[[Team], Any]]) -> list[Future[Any]]:
    """Run each part as one process of a team."""
    store = HashStore()
    with ThreadPoolExecutor(len(parts)) as pool:
        teams = [Team(store, index, len(parts), index) for index in range(len(parts))]
        return [pool.submit(part, team) for part, team in zip(parts, teams, strict=True)]


def test_nobody_passes_before_all_are_there() -> None:
    arrived: list[int] = []

    def part(team: Team) -> int:
        with team.together():
            for _ in range(5):
                arrived.append(team.index)
                team.wait()
                assert len(arrived) % 3 == 0
                team.wait()
        return len(arrived)

    assert [future.result() for future in play([part] * 3)] == [15] * 3


def test_the_main_process_decides() -> None:
    def part(team: Team) -> list[Any]:
        with team.together():
            return [team.share(value if team.is_main else None) for value in (True, {"a": [1, None]}, "x")]

    for future in play([part] * 2):
        assert future.result() == [True, {"a": [1, None]}, "x"]


def test_a_failure_reaches_all_with_its_exit_code() -> None:
    def fail(team: Team) -> None:
        with team.together():
            raise InputError("The weights are broken.", hint="edadm collect")

    def wait(team: Team) -> None:
        with team.together():
            team.wait()

    waiting, failing = play([wait, fail])
    for future in (waiting, failing):
        error = future.exception()
        assert (getattr(error, "message", None), getattr(error, "hint", None)) == (
            "The weights are broken.",
            "edadm collect",
        )
        assert getattr(error, "exit_code", None) == 3


def test_an_unexpected_failure_is_told_by_its_kind() -> None:
    def fail(team: Team) -> None:
        with team.together():
            raise ZeroDivisionError("by zero")

    def wait(team: Team) -> None:
        with team.together():
            team.share(None)

    failing, waiting = play([fail, wait])
    assert isinstance(failing.exception(), ZeroDivisionError)
    assert "Process 0 of the run failed: ZeroDivisionError: by zero" in str(waiting.exception())


def test_a_process_without_a_sign_of_life_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_PATIENCE_S", 0.6)
    monkeypatch.setattr(processes, "_BEAT_S", 0.1)
    monkeypatch.setattr(processes, "_LOOK_S", 0.1)

    def wait(team: Team) -> None:
        with team.together():
            team.wait()

    waiting, _ = play([wait, lambda _: None])
    error = waiting.exception()
    assert isinstance(error, LostProcessError)
    assert error.index == 1
    assert error.exit_code == 4


def test_a_process_that_works_for_long_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_PATIENCE_S", 0.5)
    monkeypatch.setattr(processes, "_BEAT_S", 0.05)
    monkeypatch.setattr(processes, "_LOOK_S", 0.05)

    def part(team: Team) -> None:
        with team.together():
            threading.Event().wait(1.5 if team.index else 0)
            team.wait()

    assert [future.result() for future in play([part] * 2)] == [None, None]


def test_one_process_alone_waits_for_nobody() -> None:
    with ALONE.together():
        ALONE.wait()
        ALONE.check()
        assert ALONE.share({"a": 1}) == {"a": 1}
    assert ALONE.device_name("auto") == "auto"
    assert ALONE.is_main


def test_one_process_of_several_that_were_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What accelerate's launcher sets on a machine without GPUs, for several processes and for one."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert join("cpu") is ALONE
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(MachineError, match="has started one") as caught:
        join("cpu")
    assert "--multi_gpu" in str(caught.value.hint)
