"""Prints what a run holds and whether it is intact, as `edadm inspect` does, without loading a model.

python examples/read_report.py RUN
"""

import sys
from pathlib import Path

from edadm_cli.artifacts import RunFolder
from edadm_cli.artifacts.inspection import inspect_run

if len(sys.argv) != 2:
    sys.exit(__doc__)
for artifact in inspect_run(RunFolder(Path(sys.argv[1]))):
    name = artifact.kind if artifact.name is None else f"{artifact.kind}/{artifact.name}"
    mebibytes = sum(file.bytes for file in artifact.payload) / 2**20
    print(f"{name:30} {mebibytes:8.2f} MiB  {'intact' if artifact.intact else artifact.problem}")
