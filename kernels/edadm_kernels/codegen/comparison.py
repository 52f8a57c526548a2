"""Compares kernels with those of an earlier survey, to prove that a change of the source leaves them as they are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from edadm_kernels.codegen.machine_code import MachineCode

REPORT = "codegen.json"
"""The name of the file in which a survey describes its kernels."""

Earlier = Mapping[tuple[str, str, int], tuple[str, int]]
"""The hash of the program and the shared memory of each kernel, by module, variant and architecture."""


def read_report(folder: Path) -> Earlier:
    """Returns the kernels of the survey that `--out` wrote to `folder`.

    Raises:
        ValueError: The folder has no report of a survey.
    """
    path = folder / REPORT
    try:
        rows = json.loads(path.read_text())["kernels"]
        return {(row["module"], row["name"], row["arch"]): (row["sha256"], row["shared_bytes"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"the report of a survey is expected in {path}, found {error!r}; "
            f"write one with python -m edadm_kernels.codegen --out {folder}"
        ) from error


def changes(codes: Iterable[MachineCode], earlier: Earlier) -> list[str]:
    """Returns one clause per kernel whose program or shared memory differ from those of an earlier survey."""
    clauses = []
    for code in codes:
        known = earlier.get((code.module, code.name, code.arch))
        if known != (code.sha256, code.shared_bytes):
            reason = "it has changed" if known else "there was no such kernel before"
            clauses.append(f"{code.module}/{code.name} on sm_{code.arch}: {reason}")
    return clauses
