"""Objects of other packages are found in one way for all groups, and one sentence says what is wrong with them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from edadm_cli import plugins
from edadm_cli.engines.isolation import _answer
from edadm_cli.errors import MachineError
from edadm_cli.plugins import plugin_failure, with_plugins, wrong_result

GROUP = "edadm.things"
MODULE = """
from tests.unit.test_plugins import Thing
OBJECT = Thing("object")
class Sub(Thing):
    def __init__(self):
        super().__init__("sub")
def make():
    return Thing("made")
TWIN = Thing("shipped")
NUMBER = 3
def fail(work):
    return work()
"""


@dataclass
class Thing:
    name: str


Install = Callable[[dict[str, str]], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs entry points, by name, that name objects of a module outside the package."""
    (tmp_path / "module_of_things.py").write_text(MODULE)
    (tmp_path / "module_that_needs_more.py").write_text("import a_library_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)

    def installed(values: dict[str, str]) -> None:
        points = [EntryPoint(name, value, GROUP) for name, value in values.items()]
        monkeypatch.setattr(plugins, "entry_points", lambda group: points if group == GROUP else [])

    return installed


def test_objects_classes_and_functions_follow_the_shipped_ones_by_name(install: Install) -> None:
    install({"c": "module_of_things:make", "a": "module_of_things:OBJECT", "b": "module_of_things:Sub"})
    assert list(with_plugins([Thing("shipped")], GROUP, Thing)) == ["shipped", "object", "sub", "made"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("module_of_things:NUMBER", r"'x' of the entry-point group edadm\.things \(.*NUMBER\) is no Thing"),
        (
            "module_of_things:TWIN",
            r"Several objects .* 'shipped': edadm itself and module_of_things \(module_of_things:TWIN\)",
        ),
        ("module_of_things:MISSING", r"'x' of .* cannot be loaded: AttributeError"),
        ("module_that_needs_more:THING", r"'x' of .* needs the package 'a_library_that_nobody_has'"),
    ],
)
def test_what_is_wrong_with_an_entry_point_is_said(install: Install, value: str, expected: str) -> None:
    install({"x": value})
    with pytest.raises(MachineError, match=expected):
        with_plugins([Thing("shipped")], GROUP, Thing)


def _failing() -> None:
    raise ValueError("nothing fits")


def _caught(work: Callable[[], None]) -> ValueError:
    with pytest.raises(ValueError, match="nothing fits") as caught:
        work()
    return caught.value


def test_an_error_is_blamed_on_the_package_whose_code_was_running(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the error was raised in what the package called."""
    monkeypatch.setitem(plugins.KINDS, GROUP, "thing")
    install({"a": "module_of_things:make", "b": "module_that_needs_more:THING"})
    fail = importlib.import_module("module_of_things").fail
    failure = plugin_failure(_caught(lambda: fail(_failing)))
    assert failure is not None
    assert failure.message == "The thing 'a' of another package failed in module_of_things: ValueError: nothing fits."
    assert failure.exit_code == 4
    assert plugin_failure(_caught(_failing)) is None

    sent: list[Any] = []
    _answer(SimpleNamespace(send=sent.append), lambda: fail(_failing))  # type: ignore[arg-type]
    assert sent == [("failed", (failure.message, failure.hint, 4))], "also from a process of its own"


def test_a_wrong_result_is_shown_with_its_package_and_shortened() -> None:
    failure = wrong_result("The metric 'mine'", Thing("mine"), "x" * 1000, "a number")
    assert failure.message.startswith("The metric 'mine' of the package tests returned 'xxx")
    assert len(failure.message) < 300
    assert failure.exit_code == 4
    pixels = wrong_result("The metric 'mine'", Thing("mine"), torch.zeros(30, 30), "a number")
    assert "returned a Tensor with shape (30, 30), where a number is expected" in pixels.message
