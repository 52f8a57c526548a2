"""Locks of artifacts: who has to wait learns what the other process does."""

from __future__ import annotations

import errno
import fcntl
from contextlib import ExitStack
from pathlib import Path

import pytest

from edadm_cli.artifacts.locks import read_lock, write_lock
from edadm_cli.errors import InputError, MachineError


def test_a_writer_learns_whether_others_read_or_write(tmp_path: Path) -> None:
    for holder, message in ((read_lock, "is being read by"), (write_lock, "is being written by")):
        with holder(tmp_path / "collect"), pytest.raises(InputError, match=message), write_lock(tmp_path / "collect"):
            pass


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, operation: int) -> None:
        if operation != fcntl.LOCK_UN:
            raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(MachineError, match=r"\.collect\.lock: this file system has no locks"):
        write_lock(tmp_path / "collect").__enter__()


def test_a_writer_whose_predecessor_ends_while_it_looks_is_not_told_of_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, attempts = fcntl.flock, []
    with ExitStack() as predecessor:
        predecessor.enter_context(write_lock(tmp_path / "collect"))

        def ends_after_the_first_attempt(descriptor: int, operation: int) -> None:
            if len(attempts) == 1:
                monkeypatch.setattr(fcntl, "flock", flock)
                predecessor.close()
            attempts.append(operation)
            flock(descriptor, operation)

        monkeypatch.setattr(fcntl, "flock", ends_after_the_first_attempt)
        path, is_written = tmp_path / "collect", pytest.raises(InputError, match="is being written by")
        with write_lock(path), is_written, read_lock(path):
            pass
    assert len(attempts) == 2, "once before its end and once after it"
