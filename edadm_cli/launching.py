"""What started this process, and how many others: the environment of torchrun, accelerate, mpirun and srun.

torchrun and accelerate set where their processes meet (`MASTER_ADDR`, `MASTER_PORT`). mpirun and srun set only the
index of each process and how many there are; the user can say in the environment where they meet.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from edadm_cli.errors import MachineError

_MEETING_PLACE = ("MASTER_ADDR", "MASTER_PORT")
# Launcher, then its variables: number of processes, index of this one, index of this one on its machine.
_VARIABLES = (
    ("torchrun or accelerate launch", "WORLD_SIZE", "RANK", "LOCAL_RANK"),
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    ("mpirun", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
    # of a step of srun; SLURM_NTASKS is of a whole allocation, in whose shell a command is one process
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
)
_TERMINAL_OF_SRUN = "SLURM_PTY_PORT"  # a shell that `srun --pty` opened: what is typed in it is one process


@dataclass(frozen=True)
class Launch:
    """The place of this process among those that were started together.

    Attributes:
        launcher: The name of the program that started them; `None` for a process on its own.
        index: The index of this process, from 0.
        count: The number of processes.
        local_index: The index of this process on its own machine.
    """

    launcher: str | None = None
    index: int = 0
    count: int = 1
    local_index: int = 0


def launched() -> Launch:
    """Returns the facts of the innermost launcher: torchrun may have been started by srun.

    A launcher that gives a number of processes without an index counts last: scripts for srun set `WORLD_SIZE` alone.
    """
    launches = []
    for launcher, *names in _VARIABLES:
        count, index, local_index = (_number(name) for name in names)
        if count is not None and not (launcher == "srun" and _TERMINAL_OF_SRUN in os.environ):
            launches.append((index is None, launcher, index or 0, count, local_index))
    if not launches:
        return Launch()
    _, launcher, index, count, local_index = min(launches, key=lambda launch: launch[0])
    if count == 1:
        return Launch()
    return Launch(launcher, index, count, index if local_index is None else local_index)


def launched_index() -> int:
    """Returns the index that the launcher gave this process; 0 without a launcher."""
    return launched().index


def launched_count() -> int:
    """Returns how many processes the launcher started."""
    return launched().count


def require_meeting_place() -> None:
    """Refuses processes that cannot meet: each would do the whole work, and all would write the same files.

    Processes of mpirun and srun can meet where the environment says where; what torchrun would set besides is added.

    Raises:
        MachineError: They do not know where to meet, or the launcher has started one process instead of several.
    """
    launch = launched()
    if launch.launcher is None:
        _require_all_were_started()
        return
    if missing := [name for name in _MEETING_PLACE if name not in os.environ]:
        raise MachineError(
            f"{launch.launcher} has started {launch.count} processes without telling them where to meet:"
            f" {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set.",
            hint=f"torchrun --nproc-per-node {launch.count} -m -- edadm_cli COMMAND, or set"
            f" {' and '.join(_MEETING_PLACE)} to a host and a free port of the first process",
        )
    variables = {"WORLD_SIZE": launch.count, "RANK": launch.index, "LOCAL_RANK": launch.local_index}
    os.environ.update({name: str(value) for name, value in variables.items()})


def _require_all_were_started() -> None:
    """Refuses the one process that `accelerate launch` starts on a machine without several GPUs.

    accelerate sets where that process would meet the others, but not that there are others.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ:
        raise MachineError(
            "accelerate launch was to start several processes and has started one, as it does without several GPUs.",
            hint="accelerate launch --multi_gpu, also for CPUs; or torchrun",
        )


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else None
