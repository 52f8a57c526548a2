"""A team of processes, played by threads with one store: they meet, exchange values, report failures, miss the dead."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import HashStore, Store

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


def test_an_unexpected_failure_is_reported_by_its_kind() -> None:
    def fail(team: Team) -> None:
        with team.together():
            raise ZeroDivisionError("by zero")

    def wait(team: Team) -> None:
        with team.together():
            team.share(None)

    failing, waiting = play([fail, wait])
    assert isinstance(failing.exception(), ZeroDivisionError)
    assert "Process 0 of the run failed: ZeroDivisionError: by zero" in str(waiting.exception())


class Clock:
    """Time that passes while the process of the test sleeps; the other process of two does what it then does.

    Args:
        store: The store of both.
        beats_until: The last second in which the other process writes a heartbeat, which it does every two seconds.
        arrives: The second in which it reaches the meeting that is waited for.
    """

    def __init__(self, store: Store, beats_until: float, arrives: float = math.inf) -> None:
        self.now = 0.0
        self._store, self._beats_until, self._arrives = store, beats_until, arrives

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self._store.set("alive/1", str(min(self.now, self._beats_until) // 2))
        if self.now >= self._arrives:
            self._store.set("here/1/1", "")


def test_a_process_without_a_heartbeat_is_lost_after_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HashStore()
    clock = Clock(store, beats_until=30)
    monkeypatch.setattr(processes, "time", clock)
    with pytest.raises(LostProcessError, match="has had no heartbeat for 60 seconds") as caught:
        Team(store, 0, 2, 0).wait()
    assert caught.value.index == 1
    assert caught.value.exit_code == 4
    assert 90 < clock.now < 92


def test_a_process_that_works_for_long_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HashStore()
    clock = Clock(store, beats_until=200, arrives=200)
    monkeypatch.setattr(processes, "time", clock)
    Team(store, 0, 2, 0).wait()
    assert clock.now == pytest.approx(200, abs=1)


def test_a_process_has_a_heartbeat_while_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_BEAT_S", 0.01)
    beats: set[bytes] = set()
    store = HashStore()
    with Team(store, 1, 2, 1).together():
        while len(beats) < 3:  # without heartbeats, the test ends at the time limit
            store.wait(["alive/1"])
            beats.add(store.get("alive/1"))


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
