"""Other work that kept a probe from its processors is noticed and reported."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest

from edadm_cli.cli import contention
from edadm_cli.cli.app import main
from edadm_cli.cli.contention import Scheduling
from tests.unit.cli.conftest import FakeStages


def _write(folder: Path, **threads: str) -> None:
    for name, text in threads.items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "schedstat").write_text(text)


def test_all_threads_count_from_when_it_was_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(contention, "_TASKS", tmp_path)
    _write(tmp_path, one="1000 9000 5", two="500 0 1", ends="70000 1 9")
    begun = Scheduling()
    assert begun.share_lost() == 0.0
    shutil.rmtree(tmp_path / "ends")
    _write(tmp_path, one="1050 9010 6", two="500 25 2", new="10 5 1")
    assert begun.share_lost() == pytest.approx(0.4)


@pytest.mark.parametrize("text", ["", "nonsense", "7"])
def test_a_system_that_does_not_tell_is_not_busy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    monkeypatch.setattr(contention, "_TASKS", tmp_path)
    _write(tmp_path, one=text)
    assert Scheduling().share_lost() == 0.0


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or sys.platform != "linux", reason="needs Linux")
def test_threads_that_share_a_processor_are_seen_to_wait() -> None:
    allowed = os.sched_getaffinity(0)
    begun, done = Scheduling(), threading.Event()

    def work() -> None:
        while not done.is_set():
            sum(map(hash, [b"x" * 1000] * 100))

    def hold_the_processor() -> int:
        return os.system(f"{sys.executable} -c 'import time; t = time.time()\nwhile time.time() < t + 1: pass'")

    if not begun.threads:
        pytest.skip("this kernel keeps no such numbers")
    os.sched_setaffinity(0, {min(allowed)})
    thread = threading.Thread(target=work)
    try:
        thread.start()
        assert hold_the_processor() == 0
        lost = begun.share_lost()  # while the thread lives: one that has ended does not count
    finally:
        done.set()
        thread.join()
        os.sched_setaffinity(0, allowed)
    assert lost > 0.1


def test_an_estimate_made_meanwhile_comes_with_a_warning(
    stages: FakeStages, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for lost, warned in ((0.45, True), (0.05, False)):
        monkeypatch.setattr(Scheduling, "share_lost", lambda self, lost=lost: lost)
        assert main(["collect", "--model", "tiny", "--dry-run", "--json"]) == 0
        captured = capsys.readouterr()
        assert any("45%" in text for text in json.loads(captured.out)["warnings"]) == warned
        assert ("the estimate assumes that this goes on." in captured.err) == warned
