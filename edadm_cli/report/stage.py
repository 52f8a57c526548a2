"""`edadm report`: writes one self-contained page that shows a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edadm_cli.artifacts import RunFolder
from edadm_cli.artifacts.files import atomic_path
from edadm_cli.report.contents import read_run
from edadm_cli.report.page import render

REPORT_FILE = "report.html"


def run(run_folder: RunFolder, bits: Sequence[str] | None = None) -> Path:
    """Writes `report.html` into a run folder, whole or not at all.

    The page names stages that were not run, with the commands that run them. Equal artifacts give equal bytes: nothing
    on the page depends on the clock, the machine or the location of the folder.

    Args:
        run_folder: The run folder.
        bits: Bit widths to show, in this order; `None` shows all, the widest first.

    Returns:
        The page's path.

    Raises:
        InputError: The run has no artifact, or none of a bit width that was named; or an artifact is broken, or was
            built from something that has changed since.
        MachineError: The disk is full or permission is denied.
    """
    page = render(read_run(run_folder, bits))
    path = run_folder.root / REPORT_FILE
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")
    return path
