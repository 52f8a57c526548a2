"""Compiles kernels in a separate process: `python -m gpu.ahead JOBS`, a file with a pickled list of `kernels.Job`."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from gpu.kernels import Job, compile_share, shares


def compile_ahead(jobs: list[Job], seconds: float) -> dict[str, Any]:
    """Compiles `jobs` in one process per core but two, for at most `seconds`; what is left compiles when it runs."""
    workers = max(1, (os.cpu_count() or 2) - 2)
    studies = Path(__file__).parents[1]
    path = os.pathsep.join([str(studies), os.environ.get("PYTHONPATH", "")])
    started, failed, unfinished = time.monotonic(), 0, 0
    with TemporaryDirectory() as folder:
        running = []
        for index, share in enumerate(shares(jobs, workers)):
            file = Path(folder) / f"{index}.pickle"
            file.write_bytes(pickle.dumps(share))
            command = [sys.executable, "-m", "gpu.ahead", str(file)]
            environment = {**os.environ, "PYTHONPATH": path}
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
        for process in running:
            try:
                out, _ = process.communicate(timeout=max(1.0, started + seconds - time.monotonic()))
                failed += int(out) if process.returncode == 0 else 1
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                unfinished += 1
    taken = round(time.monotonic() - started, 1)
    return {"jobs": len(jobs), "failed": failed, "workers": workers, "unfinished": unfinished, "compile_seconds": taken}


def main() -> None:
    """Compiles the jobs of a file and prints how many failed."""
    jobs = pickle.loads(Path(sys.argv[1]).read_bytes())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(compile_share(jobs, device))


if __name__ == "__main__":
    main()
