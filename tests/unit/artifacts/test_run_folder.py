"""A run folder: artifacts appear whole or not at all; nothing is lost or mixed without `--force`."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from edadm_cli.artifacts import Artifact, BuildSpec, ModelRef, RunFolder, open_artifact, save_json, save_tensors
from edadm_cli.artifacts.inspection import inspect_artifact, run_of_artifact
from edadm_cli.errors import InputError, MachineError, UsageError

MODEL = ModelRef(id="digits", fingerprint="f" * 64)


def _plan(kind: str = "collect", name: str | None = None, *parents: Artifact, **config: Any) -> BuildSpec:
    return BuildSpec(kind=kind, name=name, config={"num_steps": 20, **config}, seed=0, parents=parents, model=MODEL)


def _build(run: RunFolder, plan: BuildSpec, value: float = 1.0, force: bool = False) -> Artifact:
    with run.build(plan, force=force) as build:
        if build.artifact is not None:
            return build.artifact
        save_tensors(build.path / "latents.safetensors", {"latents": torch.full((3,), value)})
        save_json(build.path / "call.json", {})
        return build.commit({"device": "cpu"})


def _chain(run: RunFolder) -> Artifact:
    collect = _build(run, _plan("collect"))
    select = _build(run, _plan("select", None, collect))
    return _build(run, _plan("reconstruct", "w4a8", select))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def _children(path: Path) -> list[str]:
    return sorted(child.name for child in path.iterdir() if not child.name.endswith(".lock"))


def test_what_is_built_is_opened(run: RunFolder) -> None:
    built = _build(run, _plan())
    opened = run.open("collect")
    assert opened.manifest == built.manifest
    assert torch.equal(opened.tensors("latents.safetensors")["latents"], torch.ones(3))
    assert opened.json("call.json") == {}
    assert [entry.path for entry in opened.manifest.payload] == ["call.json", "latents.safetensors"]
    assert opened.manifest.environment["device"] == "cpu"
    with pytest.raises(InputError, match="no file 'other'"):
        opened.file("other")


def test_the_same_plan_is_up_to_date_and_touches_nothing(run: RunFolder) -> None:
    _build(run, _plan())
    before = {path: path.stat().st_mtime_ns for path in run.path("collect").rglob("*")}
    with run.build(_plan()) as build:
        assert build.up_to_date
        with pytest.raises(RuntimeError, match="nothing to commit"):
            build.commit()
    assert {path: path.stat().st_mtime_ns for path in run.path("collect").rglob("*")} == before


def test_another_plan_needs_force_and_the_message_names_what_differs(run: RunFolder) -> None:
    old = _build(run, _plan())
    with pytest.raises(InputError, match=r"num_steps: 20 -> 50") as caught, run.build(_plan(num_steps=50)):
        pass
    assert "--force" in str(caught.value.hint)
    assert run.open("collect").identity == old.identity
    new = _build(run, _plan(num_steps=50), force=True)
    assert run.open("collect").identity == new.identity != old.identity
    assert _children(run.root) == ["collect"]


def test_a_failed_build_keeps_its_files_for_the_next_one(run: RunFolder) -> None:
    with pytest.raises(RuntimeError), run.build(_plan()) as build:
        save_json(build.path / "shard.json", [1])
        raise RuntimeError
    assert not run.has("collect")
    with run.build(_plan()) as build:
        assert not build.up_to_date
        assert (build.path / "shard.json").is_file()
        build.commit()
    assert _children(run.root) == ["collect"]


def test_a_build_that_wrote_nothing_leaves_nothing(run: RunFolder) -> None:
    with pytest.raises(UsageError), run.build(_plan()):
        raise UsageError("no.")
    assert _children(run.root) == []


def test_partial_files_of_other_settings_are_never_mixed_in(run: RunFolder) -> None:
    with pytest.raises(RuntimeError), run.build(_plan(num_steps=50)) as build:
        save_json(build.path / "shard.json", [50])
        raise RuntimeError
    built = _build(run, _plan())
    assert [entry.path for entry in built.manifest.payload] == ["call.json", "latents.safetensors"]
    assert _children(run.root) == ["collect"]


def test_force_builds_the_same_plan_again_from_nothing(run: RunFolder) -> None:
    with pytest.raises(RuntimeError), run.build(_plan()) as build:
        save_json(build.path / "shard.json", [1])
        raise RuntimeError
    with run.build(_plan(), force=True) as build:
        assert list(build.path.iterdir()) == []
        build.commit()
    with run.build(_plan(), force=True) as build:
        assert not build.up_to_date
        build.commit()


def test_a_killed_replacement_resumes(run: RunFolder) -> None:
    _build(run, _plan())
    with pytest.raises(RuntimeError), run.build(_plan(num_steps=50), force=True) as build:
        save_json(build.path / "shard.json", [1])
        raise RuntimeError
    assert run.open("collect").manifest.config["num_steps"] == 20
    with run.build(_plan(num_steps=50), force=True) as build:
        assert (build.path / "shard.json").is_file()


def test_leftovers_of_killed_writes_and_scratch_are_not_committed(run: RunFolder) -> None:
    with run.build(_plan()) as build:
        save_json(build.path / "kept.json", [])
        (build.path / ".kept.json.77.edadm-tmp").write_text("half")
        (build.path / "kept.json").chmod(0o600)
        (build.path / "units").mkdir()
        save_json(build.path / "units" / "0.json", [])
        (build.path / "log.txt").write_text("not payload")
        build.discard(["units", "absent"])
        built = build.commit(ignore=["*.txt"])
    assert [entry.path for entry in built.manifest.payload] == ["kept.json"]
    assert _children(built.path) == ["kept.json", "log.txt", "manifest.json"]
    modes = {path.stat().st_mode for path in built.path.iterdir()}
    assert len(modes) == 1, "a library's own modes are set to the umask's"


def test_a_commit_killed_before_its_rename_is_finished_by_the_next_build(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            _build(run, _plan())
    assert not run.has("collect")
    with run.build(_plan()) as build:
        assert build.up_to_date
    assert run.open("collect").identity == _plan().identity


def test_a_replacement_killed_between_its_renames_gives_the_old_artifact_back(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = _build(run, _plan())
    rename = os.rename

    def die_at_the_second(source: Path, target: Path) -> None:
        if "partial" in str(source):
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", die_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            _build(run, _plan(num_steps=50), force=True)
    with run.build(_plan()) as build:
        assert build.artifact is not None
        assert build.artifact.identity == old.identity


@pytest.mark.parametrize("file", ["latents.safetensors", "call.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_reported_and_only_force_mends_it(run: RunFolder, file: str, damage: str) -> None:
    path = _build(run, _plan()).file(file)
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if damage == "flip" else content[:-1])
    with pytest.raises(InputError, match=file) as caught:
        run.open("collect")
    assert "--force" in str(caught.value.hint)
    with pytest.raises(InputError, match=file), run.build(_plan()):
        pass
    _build(run, _plan(), force=True)
    assert run.open("collect").identity == _plan().identity


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "changed after it was written"),
        ({"config": {"num_steps": 50}}, "changed after it was written"),
        ({"identity": "0" * 64}, "changed after it was written"),
        ({"kind": "select"}, "changed after it was written"),
        ({"schema_version": 99}, "schema version 99"),
        ({"extra": 1}, "not a manifest"),
        ({"payload": [{"path": "../../etc/passwd", "sha256": "", "bytes": 1}]}, "not a manifest"),
    ],
)
def test_a_manifest_edited_by_hand_is_refused(run: RunFolder, change: dict[str, Any], message: str) -> None:
    path = _build(run, _plan()).path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        run.open("collect")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"kind": 3}', "\x00\xff"])
def test_a_manifest_that_is_none_is_refused(run: RunFolder, text: str) -> None:
    path = _build(run, _plan()).path / "manifest.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"manifest\.json"):
        run.open("collect")
    assert _build(run, _plan(), force=True)


def test_a_parent_that_changed_is_reported_with_the_command_that_mends_it(run: RunFolder) -> None:
    _chain(run)
    _build(run, _plan("collect", num_steps=50), force=True)
    with pytest.raises(InputError, match="made from another 'collect'") as caught:
        run.open("select")
    assert caught.value.hint == f"edadm select --run {run.root} --force"
    with pytest.raises(InputError, match="made from another 'collect'"):
        run.open("reconstruct", "w4a8")


def test_a_parent_that_is_gone_does_not_stop_its_child(run: RunFolder) -> None:
    _chain(run)
    for path in sorted(run.path("collect").iterdir()):
        path.unlink()
    assert run.open("reconstruct", "w4a8").manifest.parents[0].kind == "select"


def test_a_parent_replaced_after_it_was_opened_is_noticed(run: RunFolder) -> None:
    collect = _build(run, _plan("collect"))
    _build(run, _plan("collect", num_steps=50), force=True)
    with pytest.raises(InputError, match="changed while"), run.build(_plan("select", None, collect)):
        pass


def test_one_builder_at_a_time_and_no_replacement_under_a_reader(run: RunFolder) -> None:
    collect = _build(run, _plan("collect"))
    with run.build(_plan("select", None, collect)):
        with pytest.raises(InputError, match=f"being written by another process .pid {os.getpid()}"):
            _build(run, _plan("select", None, collect))
        with pytest.raises(InputError, match="being read by another process"):
            _build(run, _plan("collect", num_steps=50), force=True)
        with pytest.raises(InputError, match="was made with other settings"):
            _build(run, _plan("collect", num_steps=50))
        with run.build(_plan("collect")) as build:
            assert build.up_to_date, "reading it does not stop others from finding it up to date"
        _build(run, _plan("reconstruct", "w4a8"))
    assert run.open("collect").identity == collect.identity


def test_a_folder_that_is_no_artifact_is_left_alone(run: RunFolder) -> None:
    run.path("collect").mkdir(parents=True)
    assert _build(run, _plan("collect"))
    run.path("select").mkdir()
    (run.path("select") / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="no artifact of edadm"):
        _build(run, _plan("select"), force=True)
    assert (run.path("select") / "thesis.txt").read_text() == "mine"


def test_a_folder_that_may_not_be_looked_into_does_not_count_as_missing(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(path: Path) -> None:  # permissions do not hold root
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "lstat", deny)
    with pytest.raises(MachineError, match="collect: permission is denied"):
        run.require("collect")


def test_a_missing_artifact_is_reported_with_the_command_that_makes_it(run: RunFolder) -> None:
    with pytest.raises(InputError) as caught:
        run.open("reconstruct", "w4a8")
    assert caught.value.hint == f"edadm reconstruct --bits w4a8 --run {run.root}"
    with pytest.raises(InputError, match="no 'collect' artifact"):
        open_artifact(run.path("collect"), "collect")


def test_bit_widths_live_side_by_side(run: RunFolder) -> None:
    _build(run, _plan("reconstruct", "w4a8"))
    _build(run, _plan("reconstruct", "w8a8", num_steps=21))
    assert run.names("reconstruct") == ["w4a8", "w8a8"]
    assert run.names("export") == []


@pytest.mark.parametrize("name", ["../x", "", ".hidden", "a/b"])
def test_names_cannot_leave_the_run_folder(run: RunFolder, name: str) -> None:
    with pytest.raises(ValueError, match="cannot name"):
        run.path("export", name)


@pytest.mark.parametrize(
    ("kind", "name", "flags"),
    [
        ("reconstruct", "w4a8", "--bits w4a8"),
        ("evaluate", "w4a8-my-own-engine", "--bits w4a8 --engine my-own-engine"),
        ("engine", "w4a8-my-own-engine", "--bits w4a8 --engine my-own-engine"),
        ("bench", "w8a8-w4a8-my-own-engine-cpu", "--bits w8a8,w4a8 --engine my-own-engine --device cpu"),
        ("evaluate", "full-precision", ""),
        ("evaluate", "w4a8-inception-first-block-0.08", "--bits w4a8 --features inception --cache first-block:0.08"),
        ("evaluate", "w4a8-my-own-engine-taylorseer", "--bits w4a8 --engine my-own-engine --cache taylorseer"),
        ("export", "w4.5a8", "--bits w4.5a8"),
        ("export", "w4g32a8", "--bits w4g32a8"),
        ("evaluate", "w1.8miba8-openvino", "--bits w1.8miba8 --engine openvino"),
        ("engine", "w8a8-comfyui", "--bits w8a8 --format comfyui"),
    ],
)
def test_the_command_has_the_flags_that_made_the_name(run: RunFolder, kind: str, name: str, flags: str) -> None:
    words = run.command(kind, name, force=True).split()
    assert " ".join(words[2 : words.index("--run")]) == flags
    assert ("--force" in words) == (kind != "engine")


@pytest.mark.parametrize("typed", ["reconstruct/w4a8", "w4a8", ".", "../w4a8", "../../reconstruct/w4a8"])
def test_the_run_of_an_artifact_is_known_however_its_path_is_typed(
    run: RunFolder, typed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _chain(run).path
    monkeypatch.chdir({"reconstruct/w4a8": run.root, "w4a8": folder.parent}.get(typed, folder))
    actual, kind, name = run_of_artifact(Path(typed))
    assert actual is not None
    assert (actual.root.resolve(), kind, name) == (run.root.resolve(), "reconstruct", "w4a8")
    assert [entry.kind for entry in inspect_artifact(Path(typed))] == ["reconstruct", "select", "collect"]


@pytest.mark.parametrize("name", ["W4A8", "w4a8 (copy)", ".w4a8.partial-0123"])
def test_a_copy_under_a_name_that_no_artifact_has_is_inspected_without_its_run(run: RunFolder, name: str) -> None:
    folder = _chain(run).path
    copy = folder.with_name(name)
    shutil.copytree(folder, copy)
    assert run_of_artifact(copy) == (None, name, None)
    assert [(entry.kind, entry.intact) for entry in inspect_artifact(copy)] == [("reconstruct", True)]
