"""Only regular files are read: a pipe or a device in the place of a file is refused, at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edadm_cli.artifacts import BuildSpec, ModelRef, RunFolder, save_json
from edadm_cli.artifacts.inspection import inspect_run
from edadm_cli.artifacts.locks import lock_path, read_lock
from edadm_cli.cli.current_run import run_used_last
from edadm_cli.errors import InputError
from edadm_cli.report.contents import read_run


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    with run.build(BuildSpec("collect", None, {}, 0, (), ModelRef(id="m", fingerprint="f"))) as build:
        save_json(build.path / "sampling.json", {})
        build.commit()
    return run


def replace(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "lost link": "nowhere"}[kind])


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "lost link"])
@pytest.mark.parametrize("name", ["manifest.json", "sampling.json"])
def test_what_is_no_file_is_a_broken_artifact_for_everyone(run: RunFolder, name: str, kind: str) -> None:
    replace(run.path("collect") / name, kind)
    (shown,) = inspect_run(run)
    assert not shown.intact
    assert name in (shown.problem or "")
    for read in (lambda: run.open("collect"), lambda: read_run(run, None)):
        with pytest.raises(InputError, match=name):
            read()


def test_the_memory_of_the_last_run_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EDADM_RUN", raising=False)
    (tmp_path / "runs").mkdir()
    replace(tmp_path / "runs" / ".latest", "pipe")
    with pytest.raises(InputError, match="not a regular file") as caught:
        run_used_last(None)
    assert caught.value.hint == "rm runs/.latest"


def test_so_is_a_lock(run: RunFolder) -> None:
    replace(lock_path(run.path("collect")), "pipe")
    with pytest.raises(InputError, match="not a regular file"), read_lock(run.path("collect")):
        pass
