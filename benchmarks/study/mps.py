"""NVIDIA's MPS daemons, which let several processes compute on one GPU at the same time instead of in turns."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

PROGRAM = "nvidia-cuda-mps-control"


@contextmanager
def mps_daemons(gpus: Sequence[str]) -> Iterator[str]:
    """Starts one daemon per GPU, and ends them on exit.

    Yields the start of their pipe directories; `-` and the number of a GPU complete it. It is empty where the program
    is missing or a daemon does not start: then processes use a GPU in turns.
    """
    folder = tempfile.mkdtemp(prefix="mps-")  # a short path: sockets lie in it
    places = [_environment(folder, gpu) for gpu in gpus if shutil.which(PROGRAM) and gpu != "cpu"]
    started = []
    try:
        for place in places:
            if subprocess.run([PROGRAM, "-d"], env=place, check=False).returncode == 0:
                started.append(place)
        yield f"{folder}/pipe" if places and len(started) == len(places) else ""
    finally:
        for place in started:
            subprocess.run([PROGRAM], env=place, input="quit\n", text=True, check=False)
        shutil.rmtree(folder, ignore_errors=True)


def _environment(folder: str, gpu: str) -> dict[str, str]:
    places = {"CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe-{gpu}", "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log-{gpu}"}
    for place in places.values():
        os.makedirs(place)
    return {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, **places}
