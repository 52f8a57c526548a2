"""Files that are cut, flipped, exchanged or edited, and parents that changed: reported, never used, mended by force."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edadm_cli.cli.app import main
from tests.integration.survival.helpers import (
    OPTIONS,
    Capture,
    failure,
    flip_a_bit,
    hashes,
    put_a_foreign_file,
    put_a_pickle,
    truncate,
)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, put_a_foreign_file, put_a_pickle, Path.unlink])
@pytest.mark.parametrize("name", ["latents-00001.safetensors", "features.safetensors"])
def test_a_damaged_parent_is_refused_and_mended_by_force(
    run: Path, tiny_ddpm: Path, capsys: Capture, damage: Any, name: str
) -> None:
    expected = hashes(run / "collect")
    damage(run / "collect" / name)
    broken = hashes(run)
    collect = ["collect", "--model", str(tiny_ddpm), *OPTIONS, "--run", str(run)]
    for command in (["select", "--run", str(run)], collect, ["inspect", str(run / "collect"), "--quiet"]):
        capsys.readouterr()
        assert main(command) == 3
        error = capsys.readouterr().err
        assert name in error
        assert "--force" in error
    assert hashes(run) == broken, "a refusal changes nothing"
    assert main([*collect, "--force", "-q"]) == 0
    actual = hashes(run / "collect")
    del expected["manifest.json"], actual["manifest.json"]
    assert actual == expected
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
    message = failure(capsys, ["reconstruct", "--bits", "w4a8", "--run", str(run)], 3)
    assert "was changed after it was written" in message
    assert f"edadm select --run {run} --force" in message


def test_a_parent_that_changed_under_its_child_is_noticed(run: Path, tiny_ddpm: Path, capsys: Capture) -> None:
    again = ["collect", "--model", str(tiny_ddpm), *OPTIONS, "--seed", "1", "--run", str(run)]
    message = failure(capsys, again, 3)
    assert "seed: 0 -> 1" in message
    assert main([*again, "--force", "-q"]) == 0
    message = failure(capsys, ["reconstruct", "--bits", "w4a8", "--run", str(run)], 3)
    assert "made from another 'collect'" in message
    message = failure(capsys, ["select", "--run", str(run)], 3)
    assert "parent collect" in message
    assert main(["select", "--run", str(run), "--force", "-q"]) == 0
    assert main(["inspect", str(run), "-q"]) == 0
