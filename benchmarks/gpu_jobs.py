"""Runs a list of measurements on GPUs, each in its own processes, until all are done or the time is over.

    python benchmarks/gpu_jobs.py --list
    python benchmarks/gpu_jobs.py --out measured --seconds 560
    python benchmarks/gpu_jobs.py --out measured --lanes 0:0-15 1:16-23 1:24-31 --seconds 560
    python benchmarks/gpu_jobs.py --out measured --only 'lora-.*|cache-.*'
    python benchmarks/gpu_jobs.py --out measured --report
    python benchmarks/gpu_jobs.py --out /tmp/trial --smoke

`benchmarks/gpu_jobs.toml` has the jobs, those that matter most first. A job that fails or is late costs no other one
more than its time limit. A lane is a GPU and the cores that go with it; it runs one job at a time. Jobs that measure
times run only in a lane with a GPU of its own. By default there is one lane per GPU.

OUT/NAME has the results of a job: the output of each of its commands (`0.out`), the file `log` with the commands and
what they say beside it, and the rows that its program writes; large files are in OUT/NAME/runs. `OUT/states.jsonl` says
what became of each job. The same command skips jobs that are done, failed or exceeded their limits (`--again` runs the
latter two), and goes on with those that were cut. `--pack FILE` writes everything except the folders `runs` to one
archive, even if the program is ended; unpacked elsewhere it lets a new machine go on.

`--smoke` runs the tiny form of every job on a CPU: the times mean nothing, but the programs and the stages are those of
the real run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu.jobs import Job, read_jobs
from gpu.lanes import Lane, States, only_one, parse_lanes, run_jobs

_HEADER = ("job", "state", "seconds", "fills")
_STAGES = ("job", "command", "planned, s", "took, s", "planned, MiB", "peak of the GPU, MiB", "peak of the host, MiB")


def default_lanes(smoke: bool) -> list[Lane]:
    """Returns a lane per GPU, each with its share of the cores; one lane without a GPU in a trial."""
    import torch

    cores = sorted(os.sched_getaffinity(0))
    gpus = ["cpu"] if smoke else [str(number) for number in range(torch.cuda.device_count())]
    share = len(cores) // max(1, len(gpus))
    return [Lane(gpu, tuple(cores[i * share : (i + 1) * share])) for i, gpu in enumerate(gpus)]


def report(jobs: Sequence[Job], folder: Path) -> str:
    """Returns Markdown tables of the jobs, and of what the records of their `edadm` commands say."""
    states = States(folder)
    lines: list[Sequence[str]] = [_HEADER, ("---",) * len(_HEADER)]
    for job in jobs:
        last = states.last.get(job.name, {})
        lines.append((job.name, last.get("state", ""), str(last.get("seconds", "")), job.fills))
    return f"{_markdown(lines)}\n\n{_markdown(stages(jobs, folder))}"


def stages(jobs: Sequence[Job], folder: Path) -> list[Sequence[str]]:
    """Returns the lines of a table of the `edadm` commands: what a dry run planned, and what the command took."""
    lines: list[Sequence[str]] = [_STAGES, ("---",) * len(_STAGES)]
    for job in jobs:
        planned: dict[str, Any] = {}
        for record in records(folder / job.name):
            if record.get("status") == "planned":
                planned = record.get("estimate") or {}
                continue
            values = (planned.get("seconds"), record.get("seconds"), planned.get("memory_mib"))
            peaks = (record.get("peak_cuda_memory_mib"), record.get("peak_memory_mib"))
            numbers = ("" if value is None else f"{value:,.1f}" for value in (*values, *peaks))
            lines.append((job.name, str(record["command"]), *numbers))
            planned = {}
    return lines


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def records(place: Path) -> list[dict[str, Any]]:
    """Returns the objects that the `edadm` commands of a job have printed."""
    found: list[dict[str, Any]] = []
    for path in sorted(place.glob("*.out")):
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            continue
        if isinstance(value, dict) and "command" in value:
            found.append(value)
    return found


def pack(folder: Path, file: Path) -> None:
    """Writes all but the folders `runs` to an archive."""
    with tarfile.open(file, "w:gz") as archive:
        archive.add(folder, folder.name, filter=lambda info: None if Path(info.name).name == "runs" else info)


def chosen(jobs: Sequence[Job], only: str) -> list[Job]:
    """Returns the jobs whose whole names match a regular expression, all jobs for an empty one."""
    return [job for job in jobs if not only or re.fullmatch(only, job.name)]


def main() -> None:
    """Runs the jobs, or says what became of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--only", default="", help="regular expression that the names of jobs match")
    parser.add_argument("--lanes", nargs="+", help="GPU:FIRST-LAST, such as 0:0-7; lanes that name one GPU share it")
    parser.add_argument("--seconds", type=float, default=1e9, help="time limit of all jobs")
    parser.add_argument("--again", action="store_true", help="run jobs again that failed or exceeded their limits")
    parser.add_argument("--pack", type=Path, metavar="FILE", help="write the results to this archive at the end")
    parser.add_argument("--list", action="store_true", help="print the jobs, run nothing")
    parser.add_argument("--report", action="store_true", help="print what became of the jobs, run nothing")
    parser.add_argument("--smoke", action="store_true", help="run the tiny form of every job on a CPU")
    options = parser.parse_args()
    jobs = chosen(read_jobs(), options.only)
    if options.list:
        for job in jobs:
            alone = ", alone on its GPU" if job.is_alone else ""
            print(f"{job.name}: about {job.seconds} s, at most {job.limit}{alone}. {job.fills}")
        return
    if options.out is None:
        parser.error("--out is needed to run jobs")
    folder = options.out.resolve()
    if not options.report:
        try:
            lanes = parse_lanes(options.lanes) if options.lanes else default_lanes(options.smoke)
        except ValueError as error:
            parser.error(str(error))
        if not lanes:
            parser.error("no GPU is visible; --smoke runs the tiny form of the jobs on a CPU")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that jobs are ended and noted
        with only_one(folder):
            try:
                run_jobs(jobs, lanes, folder, options.seconds, options.smoke, options.again)
            finally:
                if options.pack:
                    pack(folder, options.pack)
    print(report(jobs, folder))


if __name__ == "__main__":
    main()
