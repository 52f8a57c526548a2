"""Hashes of files: read once, and again whenever the file may have changed."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from edadm_cli.artifacts import files
from edadm_cli.artifacts.files import file_sha256

NOW = time.time_ns()
LONG_AGO = NOW - 60 * 10**9


def test_a_file_is_read_again_only_where_it_may_have_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, digest = [], hashlib.file_digest
    monkeypatch.setattr(files.time, "time_ns", lambda: NOW + 1)
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: reads.append(name) or digest(file, name))
    path = tmp_path / "file"
    for content in (b"one", b"two"):
        path.write_bytes(content)
        os.utime(path, ns=(NOW, NOW))
        assert [file_sha256(path) for _ in range(2)] == 2 * [hashlib.sha256(content).hexdigest()]
    assert len(reads) == 4  # a time of just now may be that of a further change
    os.utime(path, ns=(LONG_AGO, LONG_AGO))
    assert len({file_sha256(path) for _ in range(3)}) == 1
    assert len(reads) == 5
    path.rename(tmp_path / "other")
    assert file_sha256(tmp_path / "other") == hashlib.sha256(b"two").hexdigest()
    assert len(reads) == 5
    (tmp_path / "other").write_bytes(b"six")
    assert file_sha256(tmp_path / "other") == hashlib.sha256(b"six").hexdigest()
