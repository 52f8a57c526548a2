"""Full disks and folders that may not be written: exit code 4, and the command goes on once it can."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edadm_cli.cli.app import main
from tests.integration.survival.helpers import (
    ENVIRONMENT,
    OPTIONS,
    Capture,
    failure,
    hashes,
)

STRANGER = """
import os, sys
from pathlib import Path
from edadm_cli.artifacts import ModelRef, BuildSpec, RunFolder
from edadm_cli.cli.boundary import guard
from edadm_cli.cli.signals import handled_signals
def work():
    plan = BuildSpec("collect", None, {}, 0, (), ModelRef(id="m", fingerprint="f"))
    with RunFolder(Path(sys.argv[1])).build(plan):
        print("written")
os.setgroups([]); os.setgid(65534); os.setuid(65534)
with handled_signals(is_program=True) as signals:
    sys.exit(guard([], work, signals))
"""


@contextmanager
def _small_disk(folder: Path, options: str) -> Iterator[None]:
    """A file system in memory; skips where mounting is not permitted."""
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command here")
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


@pytest.mark.parametrize("size_kib", [4, 12, 40])
def test_a_full_disk_is_reported_and_the_command_goes_on_when_there_is_space(
    tiny_ddpm: Path, tmp_path: Path, capsys: Capture, size_kib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDADM_RUN", str(tmp_path / "disk" / "run"))
    collect = ["collect", "--model", str(tiny_ddpm), *OPTIONS]
    with _small_disk(tmp_path / "disk", f"size={size_kib}k"):
        assert "the disk is full" in failure(capsys, collect, 4)
        assert list((tmp_path / "disk").rglob("manifest.json")) == []
        _remount(tmp_path / "disk", "size=8m")
        assert main([*collect, "-q"]) == 0
        assert main(["inspect", str(tmp_path / "disk" / "run"), "-q"]) == 0


def test_a_full_disk_keeps_the_artifact_that_was_to_be_replaced(
    run: Path, tiny_ddpm: Path, tmp_path: Path, capsys: Capture
) -> None:
    expected = hashes(run)
    replace = ["collect", "--model", str(tiny_ddpm), *OPTIONS, "--seed", "1", "--force"]
    disk = tmp_path / "disk"
    with _small_disk(disk, "size=8m"):
        shutil.copytree(run, disk / "run")
        _remount(disk, f"size={_used_kib(disk) + 8}k")
        assert "the disk is full" in failure(capsys, [*replace, "--run", str(disk / "run")], 4)
        assert hashes(disk / "run" / "collect") == hashes(run / "collect")
        assert main(["inspect", str(disk / "run"), "-q"]) == 0
    assert hashes(run) == expected


def _used_kib(folder: Path) -> int:
    facts = os.statvfs(folder)
    return (facts.f_blocks - facts.f_bfree) * facts.f_frsize // 1024


def test_a_folder_that_cannot_be_written_is_reported(tiny_ddpm: Path, tmp_path: Path, capsys: Capture) -> None:
    collect = ["collect", "--model", str(tiny_ddpm), *OPTIONS, "--run", str(tmp_path / "disk" / "run")]
    if os.geteuid() != 0:
        (tmp_path / "disk").mkdir(mode=0o555)
        assert "permission is denied" in failure(capsys, collect, 4)
        return
    with _small_disk(tmp_path / "disk", "size=1m"):  # permissions do not hold root
        _remount(tmp_path / "disk", "ro")
        assert "the file system is read-only" in failure(capsys, collect, 4)


def test_a_run_on_a_read_only_disk_is_up_to_date_and_replaced_by_nothing(
    run: Path, tiny_ddpm: Path, tmp_path: Path, capsys: Capture
) -> None:
    collect = ["collect", "--model", str(tiny_ddpm), *OPTIONS, "--run", str(tmp_path / "disk" / "run")]
    with _small_disk(tmp_path / "disk", "size=8m"):
        shutil.copytree(run, tmp_path / "disk" / "run")
        _remount(tmp_path / "disk", "ro")
        assert main([*collect, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["status"] == "up_to_date"
        assert "read-only" in failure(capsys, [*collect, "--force"], 4)


def test_a_folder_of_another_user_is_reported(tmp_path: Path) -> None:
    """As a user without rights, which root can become."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(tmp_path / "run")],
        capture_output=True, text=True, check=False, env=ENVIRONMENT,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (4, "")
    assert "permission is denied" in done.stderr
    assert not (tmp_path / "run").exists()
