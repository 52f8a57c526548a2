"""Which of how many a process is, by what launchers leave in its environment; what cannot meet is refused."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from edadm_cli import launching
from edadm_cli.cli.app import main
from edadm_cli.errors import MachineError
from edadm_cli.launching import Launch, launched
from edadm_cli.processes import ALONE, join

ROOT = Path(__file__).parents[2]
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
MPICH = {"PMI_SIZE": "2", "PMI_RANK": "1"}
TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = {**ALLOCATION, "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "1"}
LAUNCHES: dict[str, tuple[dict[str, str], Launch]] = {
    "nothing": ({}, Launch()),
    "torchrun": (TORCHRUN, Launch("torchrun or accelerate launch", 1, 2, 1)),
    "torchrun of one": ({"WORLD_SIZE": "1", "RANK": "0"}, Launch()),
    "Open MPI": (OPEN_MPI, Launch("mpirun", 3, 4, 1)),
    "Open MPI, one": ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, Launch()),
    "MPICH": (MPICH, Launch("mpirun", 1, 2, 1)),
    "srun": (STEP, Launch("srun", 2, 4, 1)),
    "srun of one": ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Launch()),
    "the shell of an allocation": (ALLOCATION, Launch()),
    "a shell of srun --pty": ({**STEP, "SLURM_PTY_PORT": "41555"}, Launch()),
    "torchrun by srun": ({**STEP, **TORCHRUN}, Launch("torchrun or accelerate launch", 1, 2, 1)),
    "one process of mpirun in a step of its daemons": (
        {**STEP, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        Launch(),
    ),
    "srun with a script's WORLD_SIZE": ({**STEP, "WORLD_SIZE": "4"}, Launch("srun", 2, 4, 1)),
}


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's variables; what a test sets or the code adds is gone after it."""
    known = {name for _, *names in launching._VARIABLES for name in names}
    for name in (*known, "MASTER_ADDR", "MASTER_PORT", "SLURM_PTY_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(("variables", "expected"), LAUNCHES.values(), ids=LAUNCHES.keys())
def test_the_innermost_launcher_counts(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: Launch
) -> None:
    set_all(monkeypatch, variables)
    assert launched() == expected
    if expected.count == 1:
        assert join("cpu") is ALONE


@pytest.mark.parametrize(("variables", "launcher", "count"), [(OPEN_MPI, "mpirun", 4), (STEP, "srun", 4)])
def test_processes_that_cannot_meet_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], launcher: str, count: int
) -> None:
    set_all(monkeypatch, variables)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(
        MachineError, match=f"(?m)^{launcher} has started {count} processes .* MASTER_PORT is not set.$"
    ) as caught:
        join("cpu")
    assert str(caught.value.hint).startswith(f"torchrun --nproc-per-node {count} -m -- edadm_cli ")
    assert caught.value.exit_code == 4


def test_other_commands_are_refused_by_the_launchers_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_all(monkeypatch, {**STEP, "SLURM_PROCID": "0"})
    assert main(["select", "--run", "runs/none"]) == 2
    error = capsys.readouterr().err
    assert "edadm select runs in one process, and 4 were started" in error
    assert "without srun" in error
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert main(["select", "--run", "runs/none"]) == 2
    assert capsys.readouterr().err == "", "said once"


WORK = """
import atexit, json, torch
from edadm_cli.processes import join

atexit.register(lambda: print(json.dumps(torch.distributed.is_initialized())))  # runs after what is registered later
team = join("cpu")
with team.together():
    total = torch.tensor([team.index + 1.0])
    team.sum(total)
    print(json.dumps([team.index, team.count, total.item(), team.share("of the main one" if team.is_main else None)]))
"""


def free_port() -> int:
    """Returns a port that is free and lies below those that the system gives to outgoing connections."""
    for port in random.sample(range(20_000, 32_000), 50):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    pytest.fail("none of 50 ports is free")


@pytest.mark.parametrize(
    "names",
    [
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
        ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    ],
    ids=["mpirun", "srun"],
)
def test_processes_that_are_told_where_to_meet_do(names: tuple[str, str, str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORK],
            env={**environment, "PYTHONPATH": str(ROOT), **dict(zip(names, ("2", index, index), strict=True))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in "01"
    ]
    outputs = [process.communicate(timeout=280) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    actual = [[json.loads(line) for line in out.splitlines()] for out, _ in outputs]
    connected_at_exit = False
    assert actual == [[[index, 2, 3.0, "of the main one"], connected_at_exit] for index in (0, 1)]
