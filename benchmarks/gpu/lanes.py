"""Runs jobs in lanes: each in its own processes, on one GPU and some cores, until its time is over.

What became of each job is a line of JSON in `OUT/states.jsonl`; the last line of a job counts. A job's processes carry
`EDADM_JOBS=OUT` in their environment, by which all of them can be ended, those that started a session of their own too.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from gpu.jobs import REPOSITORY, Job

MARK = "EDADM_JOBS"
SMOKE_SECONDS = 1800
"""The time limit of a job's tiny form."""
LEAST_SECONDS = 60
"""A job that resumes is begun while so much time is left; any other job needs the time that it usually takes."""


@dataclass(frozen=True)
class Lane:
    """A GPU and the processor cores of one job at a time.

    Args:
        gpu: The number of the GPU, or `cpu`.
        cores: The processor cores.
        is_alone: Whether no other lane has this GPU, so that times can be measured on it.
    """

    gpu: str
    cores: tuple[int, ...]
    is_alone: bool = True

    def __str__(self) -> str:
        return f"{self.gpu}:{self.cores[0]}-{self.cores[-1]}"


def parse_lanes(texts: Sequence[str]) -> list[Lane]:
    """Returns the lanes of `GPU:FIRST-LAST`, such as `0:0-7`; lanes that name one GPU share it.

    Raises:
        ValueError: A text has another form, or two lanes have a core in common.
    """
    lanes = []
    for text in texts:
        gpu, _, cores = text.partition(":")
        first, _, last = cores.partition("-")
        if not gpu or not first.isdigit() or not (last or first).isdigit() or int(last or first) < int(first):
            raise ValueError(f"A lane is GPU:FIRST-LAST, such as 0:0-7 or cpu:0-1; this is '{text}'.")
        lanes.append(Lane(gpu, tuple(range(int(first), int(last or first) + 1))))
    used = [core for lane in lanes for core in lane.cores]
    if len(used) != len(set(used)):
        raise ValueError("Two lanes have a core in common.")
    gpus = [lane.gpu for lane in lanes]
    return [Lane(lane.gpu, lane.cores, gpus.count(lane.gpu) == 1) for lane in lanes]


class States:
    """What became of each job of a folder.

    Args:
        folder: The folder of all results.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "states.jsonl"
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self.last: dict[str, dict[str, Any]] = {}
        for line in lines:
            with suppress(json.JSONDecodeError):  # the last line of a process that was killed may be cut short
                row = json.loads(line)
                self.last[row["job"]] = row

    def state(self, job: Job) -> str | None:
        """Returns the state of a job, `None` if it was never begun."""
        return self.last[job.name]["state"] if job.name in self.last else None

    def write(self, job: Job, state: str, **facts: Any) -> None:
        """Adds a line."""
        row = {"job": job.name, "state": state, "at": time.strftime("%Y-%m-%d %H:%M:%S"), **facts}
        self.last[job.name] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def waiting_jobs(jobs: Sequence[Job], states: States, again: bool) -> list[Job]:
    """Returns the jobs to run, in their order, those with which the program itself was killed after the others.

    Args:
        jobs: The jobs.
        states: What became of them.
        again: Whether those that failed or were late come last, or not at all.
    """
    kinds: list[tuple[str | None, ...]] = [(None, "cut"), ("begun",), *([("failed", "late")] if again else [])]
    return [job for kind in kinds for job in jobs if states.state(job) in kind]


def next_job(waiting: Sequence[Job], lane: Lane, lanes: Sequence[Lane], seconds_left: float) -> Job | None:
    """Returns the job that a lane begins, if there is one.

    A lane with a GPU of its own begins with the jobs that need one, where other lanes can run the rest.
    """
    ready = [
        job for job in waiting if seconds_left >= (min(job.seconds, LEAST_SECONDS) if job.resumes else job.seconds)
    ]
    if not lane.is_alone:
        return next((job for job in ready if not job.is_alone), None)
    has_others = any(not other.is_alone for other in lanes)
    return next((job for job in ready if job.is_alone or not has_others), next(iter(ready), None))


@dataclass
class Running:
    """A job that is being run: its commands one after the other, until one fails or the time is over.

    Args:
        job: The job.
        lane: Where it runs.
        folder: The folder of its results.
        smoke: Whether its tiny form runs.
        deadline: The time at which it is stopped.
    """

    job: Job
    lane: Lane
    folder: Path
    smoke: bool
    deadline: float
    started: float = field(default_factory=time.monotonic)
    codes: list[int] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        """Writes the files that the job reads, and starts its first command that has not ended well before."""
        place = self.folder / self.job.name
        (place / "runs").mkdir(parents=True, exist_ok=True)
        for name, text in self.job.files.items():
            (place / name).write_text(text, encoding="utf-8")
        ended = self._ended.read_text().count("\n") if self.job.resumes and self._ended.exists() else 0
        self.codes = [0] * min(ended, len(self.job.lines(self.smoke)) - 1)
        self._ended.write_text("0\n" * len(self.codes))
        self._start()

    @property
    def _ended(self) -> Path:
        """The file with a line per command that has ended well; it is lost together with the job's large files."""
        return self.folder / self.job.name / "runs" / "ended"

    def has_ended(self) -> bool:
        """Returns whether the job has ended; starts its next command if one has just ended well."""
        assert self.process is not None
        code = self.process.poll()
        if code is None:
            return False
        self.codes.append(code)
        if code != 0 or len(self.codes) == len(self.job.lines(self.smoke)):
            return True
        with self._ended.open("a") as file:
            file.write("0\n")
        self._start()
        return False

    def end(self) -> None:
        """Ends all processes of the job."""
        end_processes(MARK, str(self.folder / self.job.name))
        if self.process is not None:
            self.process.wait()

    def _start(self) -> None:
        place, number = self.folder / self.job.name, len(self.codes)
        left = max(1, int(self.deadline - time.monotonic()) - 5)
        words = self.job.words(number, place, left, self.lane.gpu, len(self.lane.cores), self.smoke)
        words[:1] = {"python": [sys.executable], "edadm": [sys.executable, "-m", "edadm_cli"]}[words[0]]
        with (place / f"{number}.out").open("wb") as output, (place / "log").open("ab") as log:
            log.write(f"$ {shlex.join(words)}\n".encode())
            log.flush()
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
                cwd=REPOSITORY,
                env=environment(self.lane, place),
                preexec_fn=partial(_use_cores, self.lane.cores),
            )


def environment(lane: Lane, place: Path) -> dict[str, str]:
    """Returns the environment of a job's processes: they see one GPU, or none, and one thread per core of the lane."""
    return {
        **os.environ,
        MARK: str(place),
        "CUDA_VISIBLE_DEVICES": "" if lane.gpu == "cpu" else lane.gpu,
        "OMP_NUM_THREADS": str(len(lane.cores)),
        "EDADM_RUN": str(place / "runs" / "run"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def _use_cores(cores: tuple[int, ...]) -> None:
    os.sched_setaffinity(0, cores)


def end_processes(name: str, value: str) -> None:
    """Kills the processes in whose environment a variable has a value, or begins with it and a slash."""
    entry = f"{name}={value}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            entries = (folder / "environ").read_bytes().split(b"\0")
            if int(folder.name) != os.getpid() and any(e == entry or e.startswith(entry + b"/") for e in entries):
                os.kill(int(folder.name), signal.SIGKILL)


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Holds a folder, so that no second program runs jobs in it, and ends what a program that was killed left running.

    Raises:
        RuntimeError: Another program runs jobs in this folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"Another program runs jobs in {folder}.") from error
        end_processes(MARK, str(folder))
        yield


def run_jobs(
    jobs: Sequence[Job], lanes: Sequence[Lane], folder: Path, seconds: float, smoke: bool = False, again: bool = False
) -> None:
    """Runs jobs until all are done or the time is over.

    Args:
        jobs: The jobs, the most important first.
        lanes: Where they run, one job at a time in each.
        folder: The folder of the results, as an absolute path.
        seconds: The time limit of all jobs.
        smoke: Whether the jobs' tiny forms run.
        again: Whether jobs that failed or exceeded their limits are run again.
    """
    last = time.monotonic() + seconds
    states = States(folder)
    waiting, running = waiting_jobs(jobs, states, again), dict[Lane, Running]()
    try:
        while True:
            for lane in lanes:
                job = None if lane in running else next_job(waiting, lane, lanes, last - time.monotonic())
                if job is not None:
                    waiting.remove(job)
                    states.write(job, "begun", lane=str(lane))
                    limit = SMOKE_SECONDS if smoke else job.limit
                    running[lane] = Running(job, lane, folder, smoke, min(last, time.monotonic() + limit))
                    running[lane].begin()
            if not running:
                break
            time.sleep(0.1)
            _finish(running, states, last)
    finally:
        for one in running.values():
            one.end()
            states.write(one.job, "cut", **_facts(one))
    for job in waiting:
        has_place = not job.is_alone or any(lane.is_alone for lane in lanes)
        print(json.dumps({"job": job.name, "waits for": "time" if has_place else "a lane with a GPU of its own"}))


def _finish(running: dict[Lane, Running], states: States, last: float) -> None:
    """Notes the jobs that have ended, and ends those whose time is over."""
    for lane, one in list(running.items()):
        ended = one.has_ended()
        if not ended and time.monotonic() < one.deadline:
            continue
        one.end()
        del running[lane]
        state = ("failed" if any(one.codes) else "done") if ended else "cut" if one.deadline >= last else "late"
        states.write(one.job, state, **_facts(one))


def _facts(one: Running) -> dict[str, Any]:
    return {"seconds": round(time.monotonic() - one.started, 1), "codes": one.codes, "lane": str(one.lane)}
