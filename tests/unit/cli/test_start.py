"""The start of the program: Ctrl-C while the command line is being imported."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from edadm_cli.cli.start import main


class Interrupted(ModuleType):
    def __getattr__(self, name: str) -> None:
        raise KeyboardInterrupt


def test_ctrl_c_during_the_import_is_no_stack_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "edadm_cli.cli.app", Interrupted("edadm_cli.cli.app"))
    assert main() == 130
    assert capsys.readouterr().err == "Interrupted.\n"
