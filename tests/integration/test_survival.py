"""What must survive: kills, crowds, damage, full disks, closed doors and odd input, through the command line.

Each ends in one sentence and the documented exit code, and leaves a run folder to go on with.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edadm_cli.artifacts import RunFolder
from edadm_cli.cli.app import main

Capture = pytest.CaptureFixture[str]
OPTIONS = ["--num-trajectories", "4", "--num-steps", "3", "--batch-size", "2", "--device", "cpu"]
HOLDER = """
import sys, time
from pathlib import Path
from edadm_cli.artifacts import ModelRef, Plan, RunFolder, save_json
run = RunFolder(Path(sys.argv[1]))
parents = tuple(run.open(kind) for kind in sys.argv[3:])
with run.build(Plan(sys.argv[2], None, {}, 0, parents, ModelRef(id="m", fingerprint="f"))) as build:
    save_json(build.path / "shard.json", [])
    print("holding", flush=True)
    time.sleep(600)
"""
SLOW_WRITER = """
import os, sys
from pathlib import Path
from edadm_cli.artifacts import ModelRef, Plan, RunFolder, save_json
run = RunFolder(Path(sys.argv[1]))
with run.build(Plan("collect", None, {"shards": 40}, 0, (), ModelRef(id="m", fingerprint="f"))) as build:
    for index in range(0 if build.up_to_date else 40):
        path = build.path / f"shard-{index}.json"
        if not path.exists():
            save_json(path, [index] * 2000)
        print(index, flush=True)
    if not build.up_to_date:
        build.commit()
"""
STRANGER = """
import os, sys
from pathlib import Path
from edadm_cli.artifacts import ModelRef, Plan, RunFolder
from edadm_cli.cli.boundary import guard
def work():
    plan = Plan("collect", None, {}, 0, (), ModelRef(id="m", fingerprint="f"))
    with RunFolder(Path(sys.argv[1])).build(plan):
        print("written")
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.exit(guard([], work))
"""
# The working folder changes in these tests; the package must be found all the same.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def _failure(capsys: Capture, arguments: list[str], code: int) -> str:
    """Run a command that must fail: one sentence and a hint on stderr, nothing else; gives them."""
    capsys.readouterr()
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0].startswith("error: "), captured.err
    assert len(lines) <= 2, captured.err
    assert all(line.startswith("hint: ") for line in lines[1:])
    return captured.err


def _hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    }


@pytest.fixture(scope="module")
def pristine(tiny_ddpm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a `collect` and a `select` artifact."""
    run = tmp_path_factory.mktemp("pristine") / "run"
    assert main(["collect", "--model", str(tiny_ddpm), *OPTIONS, "--run", str(run), "-q"]) == 0
    assert main(["select", "--run", str(run), "-q"]) == 0
    return run


@pytest.fixture
def run(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that run, and an empty working folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pristine, tmp_path / "run")
    return Path("run")


@contextmanager
def _process(script: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", script, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


# Two processes


def test_a_second_builder_is_told_who_is_at_it(run: Path, tiny_ddpm: Path, capsys: Capture) -> None:
    shutil.rmtree(run / "collect")
    before = _hashes(run)
    again = ["collect", "--model", str(tiny_ddpm), *OPTIONS, "--run", str(run)]
    with _process(HOLDER, str(run), "collect") as holder:
        assert _first_line(holder) == "holding"
        message = _failure(capsys, again, 3)
        assert f"is being written by another process (pid {holder.pid})" in message
    assert main([*again, "-q"]) == 0, "the lock ends with its process, also with kill -9"
    assert main(["inspect", str(run), "-q"]) == 0
    assert _hashes(run / "select") == {
        name.removeprefix("select/"): value for name, value in before.items() if name.startswith("select/")
    }


def test_a_parent_is_not_replaced_while_its_child_is_built(
    run: Path, tiny_ddpm: Path, capsys: Capture
) -> None:
    before = _hashes(run / "collect")
    replace = ["collect", "--model", str(tiny_ddpm), *OPTIONS, "--seed", "5", "--run", str(run), "--force"]
    with _process(HOLDER, str(run), "reconstruct", "select", "collect") as holder:
        assert _first_line(holder) == "holding"
        assert "is being read by another process" in _failure(capsys, replace, 3)
        assert main(["inspect", str(run), "-q"]) == 0, "reading is for everybody"
    assert _hashes(run / "collect") == before


def test_two_writers_at_once_leave_one_whole_artifact(tmp_path: Path) -> None:
    """Started together again and again: one of them builds, the other is told or finds it up to date."""
    for attempt in range(3):
        root = tmp_path / f"run-{attempt}"
        command = [sys.executable, "-c", SLOW_WRITER, str(root)]
        pair = [
            subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
            )
            for _ in range(2)
        ]
        errors = [process.communicate()[1] for process in pair]
        assert [process.returncode for process in pair].count(0) >= 1
        for process, error in zip(pair, errors, strict=True):
            assert process.returncode == 0 or "being written by another process" in error
        assert len(RunFolder(root).open("collect").manifest.payload) == 40


# Kills


def _write(root: Path) -> None:
    command = [sys.executable, "-c", SLOW_WRITER, str(root)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)


def test_a_killed_build_resumes_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    _write(whole)
    killed = tmp_path / "killed"
    for lines in (1, 15, 30):
        with _process(SLOW_WRITER, str(killed)) as process:
            for _ in range(lines):
                _first_line(process)
            process.send_signal(signal.SIGKILL)
        assert not RunFolder(killed).has("collect")
    _write(killed)
    expected = _hashes(whole / "collect")
    found = _hashes(killed / "collect")
    del expected["manifest.json"], found["manifest.json"]  # they tell the time
    assert found == expected
    assert RunFolder(killed).open("collect").identity == RunFolder(whole).open("collect").identity
    assert [path.name for path in killed.iterdir() if "partial" in path.name] == []


def test_an_interrupted_command_exits_with_130_and_resumes(tiny_ddpm: Path, tmp_path: Path) -> None:
    script = "import sys; from edadm_cli.cli.app import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["collect", "--model", str(tiny_ddpm), "--num-trajectories", "2000", "--num-steps", "50",
                 "--batch-size", "1", "--device", "cpu", "--run", str(tmp_path / "run")]  # fmt: skip
    command = [sys.executable, "-c", script, *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("run/.collect.partial-*/latents-*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130
    assert error == "error: Interrupted.\nhint: the same command resumes where it was\n"
    assert list(tmp_path.glob("run/.collect.partial-*/latents-*")), "what was done is kept"


# Damage


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(bytes(content))


def _put_a_foreign_file(path: Path) -> None:
    import torch

    from edadm_cli.artifacts import save_tensors

    save_tensors(path, {"other": torch.zeros(3)})


def _put_a_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"latents": [1, 2, 3]}))


@pytest.mark.parametrize("damage", [_truncate, _flip_a_bit, _put_a_foreign_file, _put_a_pickle, Path.unlink])
@pytest.mark.parametrize("name", ["latents-00001.safetensors", "features.safetensors"])
def test_a_damaged_parent_is_refused_and_mended_by_force(
    run: Path, tiny_ddpm: Path, capsys: Capture, damage: Any, name: str
) -> None:
    expected = _hashes(run / "collect")
    damage(run / "collect" / name)
    broken = _hashes(run)
    collect = ["collect", "--model", str(tiny_ddpm), *OPTIONS, "--run", str(run)]
    for command in (["select", "--run", str(run)], collect, ["inspect", str(run / "collect"), "--quiet"]):
        capsys.readouterr()
        assert main(command) == 3
        error = capsys.readouterr().err
        assert name in error
        assert "--force" in error
    assert _hashes(run) == broken, "a refusal changes nothing"
    assert main([*collect, "--force", "-q"]) == 0
    found = _hashes(run / "collect")
    del expected["manifest.json"], found["manifest.json"]
    assert found == expected
    assert main(["select", "--run", str(run), "-q"]) == 0


@pytest.mark.parametrize("key", ["seed", "config", "parents", "model", "identity"])
def test_a_manifest_edited_by_hand_is_refused(run: Path, capsys: Capture, key: str) -> None:
    path = run / "select" / "manifest.json"
    manifest = json.loads(path.read_text())
    changed = {
        "seed": 1,
        "config": {**manifest["config"], "num_samples": 3},
        "parents": [{**manifest["parents"][0], "identity": "0" * 64}],
        "model": {**manifest["model"], "fingerprint": "0" * 64},
        "identity": "0" * 64,
    }
    path.write_text(json.dumps({**manifest, key: changed[key]}))
    message = _failure(capsys, ["reconstruct", "--bits", "w4a8", "--run", str(run)], 3)
    assert "was changed after it was written" in message
    assert f"edadm select --run {run} --force" in message


def test_a_parent_that_changed_under_its_child_is_noticed(
    run: Path, tiny_ddpm: Path, capsys: Capture
) -> None:
    again = ["collect", "--model", str(tiny_ddpm), *OPTIONS, "--seed", "1", "--run", str(run)]
    message = _failure(capsys, again, 3)
    assert "seed: 0 -> 1" in message
    assert main([*again, "--force", "-q"]) == 0
    message = _failure(capsys, ["reconstruct", "--bits", "w4a8", "--run", str(run)], 3)
    assert "made from another 'collect'" in message
    message = _failure(capsys, ["select", "--run", str(run)], 3)
    assert "parent collect" in message
    assert main(["select", "--run", str(run), "--force", "-q"]) == 0
    assert main(["inspect", str(run), "-q"]) == 0


# Disks and doors


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
def test_a_full_disk_is_told_and_the_command_goes_on_when_there_is_space(
    tiny_ddpm: Path, tmp_path: Path, capsys: Capture, size_kib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDADM_RUN", str(tmp_path / "disk" / "run"))
    collect = ["collect", "--model", str(tiny_ddpm), *OPTIONS]
    with _small_disk(tmp_path / "disk", f"size={size_kib}k"):
        assert "the disk is full" in _failure(capsys, collect, 4)
        assert list((tmp_path / "disk").rglob("manifest.json")) == []
        _remount(tmp_path / "disk", "size=8m")
        assert main([*collect, "-q"]) == 0
        assert main(["inspect", str(tmp_path / "disk" / "run"), "-q"]) == 0


def test_a_full_disk_keeps_the_artifact_that_was_to_be_replaced(
    run: Path, tiny_ddpm: Path, tmp_path: Path, capsys: Capture
) -> None:
    expected = _hashes(run)
    replace = ["collect", "--model", str(tiny_ddpm), *OPTIONS, "--seed", "1", "--force"]
    disk = tmp_path / "disk"
    with _small_disk(disk, "size=8m"):
        shutil.copytree(run, disk / "run")
        _remount(disk, f"size={_used_kib(disk) + 8}k")
        assert "the disk is full" in _failure(capsys, [*replace, "--run", str(disk / "run")], 4)
        assert _hashes(disk / "run" / "collect") == _hashes(run / "collect")
        assert main(["inspect", str(disk / "run"), "-q"]) == 0
    assert _hashes(run) == expected


def _used_kib(folder: Path) -> int:
    facts = os.statvfs(folder)
    return (facts.f_blocks - facts.f_bfree) * facts.f_frsize // 1024


def test_a_folder_that_cannot_be_written_is_told(tiny_ddpm: Path, tmp_path: Path, capsys: Capture) -> None:
    collect = ["collect", "--model", str(tiny_ddpm), *OPTIONS, "--run", str(tmp_path / "disk" / "run")]
    if os.geteuid() != 0:
        (tmp_path / "disk").mkdir(mode=0o555)
        assert "permission is denied" in _failure(capsys, collect, 4)
        return
    with _small_disk(tmp_path / "disk", "size=1m"):  # permissions do not hold root
        _remount(tmp_path / "disk", "ro")
        assert "the file system is read-only" in _failure(capsys, collect, 4)


def test_a_folder_of_another_user_is_told(tmp_path: Path) -> None:
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


# Odd input


@pytest.mark.parametrize("bits", ["w9a8", "w4", "banana"])
def test_bit_widths_that_are_none(run: Path, capsys: Capture, bits: str) -> None:
    before = _hashes(run)
    assert f"got '{bits}'" in _failure(capsys, ["reconstruct", "--bits", bits, "--run", str(run)], 2)
    assert _hashes(run) == before


@pytest.mark.parametrize(
    ("content", "text"),
    [(None, "prompts.txt"), (b"", "prompts.txt"), (b"\n \n", "prompts.txt"), (b"caf\xe9 \xff\n", "UTF-8")],
    ids=["missing", "empty", "blank", "not UTF-8"],
)
def test_prompt_files_that_cannot_be_used(
    tiny_sd: Path, tmp_path: Path, capsys: Capture, content: bytes | None, text: str
) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    arguments = ["--prompts", str(path), "--run", str(tmp_path / "run")]
    assert text in _failure(capsys, ["collect", "--model", str(tiny_sd), *OPTIONS, *arguments], 3)
    assert not (tmp_path / "run" / "collect").exists()


@pytest.mark.parametrize(
    "lines",
    [["<script>alert(1)</script>", "[bold]x[/bold]", "\x1b[31mred"], [f"prompt {i}" for i in range(10_000)]],
    ids=["markup", "10,000 lines"],
)
def test_prompt_files_that_are_odd_but_usable(
    tiny_sd: Path, tmp_path: Path, capsys: Capture, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    capsys.readouterr()
    arguments = ["--prompts", "prompts.txt", "--run", "run", "--json"]
    assert main(["collect", "--model", str(tiny_sd), *OPTIONS, *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "done"
    assert json.loads(Path("run/collect/sampling.json").read_text())["prompts"][:3] == lines[:3]


class _Code:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.trace),)


def test_a_pickled_checkpoint_with_code_in_it_runs_nothing(
    tiny_ddpm: Path, tmp_path: Path, capsys: Capture
) -> None:
    import torch

    trace = tmp_path / "the-code-ran"
    model = tmp_path / "model"
    shutil.copytree(tiny_ddpm, model)
    (weights,) = (model / "unet").glob("*.safetensors")
    weights.unlink()
    torch.save({"conv_in.weight": _Code(trace)}, model / "unet" / "diffusion_pytorch_model.bin")
    pickle.loads(pickle.dumps(_Code(tmp_path / "the-trap-works")))
    assert (tmp_path / "the-trap-works").exists()
    single = tmp_path / "model.ckpt"
    torch.save({"state_dict": _Code(trace)}, single)
    for path in (model, single):
        _failure(capsys, ["collect", "--model", str(path), *OPTIONS, "--run", str(tmp_path / "run")], 3)
    assert not trace.exists()


@pytest.mark.parametrize("damage", ["nan", "truncated", "foreign"])
def test_broken_weights_are_refused(tiny_ddpm: Path, tmp_path: Path, capsys: Capture, damage: str) -> None:
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(tiny_ddpm, model)
    (weights,) = (model / "unet").glob("*.safetensors")
    if damage == "nan":
        tensors = load_file(weights)
        tensors["conv_in.weight"][0, 0, 0, 0] = float("nan")
        save_file(tensors, weights)
    elif damage == "truncated":
        _truncate(weights)
    else:
        _put_a_foreign_file(weights)
    message = _failure(
        capsys, ["collect", "--model", str(model), *OPTIONS, "--run", str(tmp_path / "run")], 3
    )
    assert ("conv_in.weight" if damage == "nan" else weights.name) in message
