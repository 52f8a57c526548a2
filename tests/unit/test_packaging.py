"""What is shipped and how: package data, entry points, the Makefile and the build server's command."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edadm_cli.version import __version__

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "edadm_cli"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAX_SHIPPED_BYTES = 64_000_000
PLACE = re.compile(r"(/|[A-Za-z]:\\|~/)\w+[/\\]")


def _data_files(package: Path = PACKAGE) -> set[Path]:
    files = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path for path in files if path.suffix != ".py"}


@pytest.mark.parametrize("package", [PACKAGE, ROOT / "kernels" / "edadm_kernels"], ids=lambda package: package.name)
def test_every_data_file_is_shipped(package: Path) -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"][package.name]
    shipped = {path for pattern in patterns for path in package.glob(pattern.replace("**", "**/*"))}
    assert _data_files(package) - shipped == set()


def test_the_shipped_models_stay_small() -> None:
    assert sum(path.stat().st_size for path in _data_files()) < MAX_SHIPPED_BYTES


def test_no_shipped_model_says_where_it_lay() -> None:
    """Of a vocabulary, the keys are texts and the values are numbers, so it has no such value either."""

    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        for child in children:
            yield from texts(child)

    described = [path for path in _data_files() if path.suffix == ".json"]
    found = {path: [text for text in texts(json.loads(path.read_text())) if PLACE.match(text)] for path in described}
    assert any(path.name == "model_index.json" for path in found)
    assert {path: places for path, places in found.items() if places} == {}


def test_entry_points_lead_to_functions() -> None:
    points = [PROJECT["project"]["scripts"]["edadm"]]
    points += PROJECT["project"]["entry-points"]["torch.backends"].values()
    for point in points:
        module, _, name = point.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_the_version_is_written_once() -> None:
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "edadm_cli.version.__version__"
    assert importlib.import_module("edadm_cli").__version__ == __version__


@pytest.mark.parametrize("code", [0, 2])
def test_the_build_server_tests_in_an_environment_that_is_gone_afterwards(tmp_path: Path, code: int) -> None:
    """A stand-in for `make` records where the environment would be created."""
    stub = tmp_path / "make"
    stub.write_text(f'#!/bin/sh\necho "$PWD $*"\nmkdir -p "${{2#VENV=}}"\nexit {code}\n')
    stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    places = set()
    for _ in range(2):
        done = subprocess.run([str(ROOT / ".ci" / "run")], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        folder, target, variable = done.stdout.split()
        assert (folder, target) == (str(ROOT), "test")
        place = Path(variable.removeprefix("VENV="))
        assert not place.parent.exists()
        places.add(place)
    assert len(places) == 2, "new on every run"


def test_the_makefile_installs_once_for_each_state_of_the_project(tmp_path: Path) -> None:
    """`make -n` says what would be run: nothing but the tests once the stamp is newer than pyproject.toml."""
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").touch()

    def plan() -> str:
        command = ["make", "--dry-run", "test", f"VENV={folder}"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        return done.stdout

    assert "pip install" in plan()
    stamp = folder / ".installed-dev"
    stamp.touch()
    assert "pip install" not in plan()
    os.utime(stamp, (0, 0))
    assert "pip install" in plan()
