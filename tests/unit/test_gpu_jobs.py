"""The program that runs measurements on GPUs: its lanes, its order, its limits, and that its list fits the programs."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
CORE = min(os.sched_getaffinity(0))


@pytest.fixture(autouse=True)
def _programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def gpu_jobs() -> ModuleType:
    return importlib.import_module("gpu_jobs")


def job(name: str, *codes: str, **fields: Any) -> Any:
    from gpu.jobs import Job

    commands = tuple(f"python -c {shlex.quote(code)}" for code in codes)
    return Job(**{"name": name, "fills": "a page", "commands": commands, "seconds": 1, "limit": 60, **fields})


def run(gpu_jobs: ModuleType, jobs: list[Any], folder: Path, seconds: float = 60, **options: Any) -> dict[str, str]:
    """Runs jobs in one lane without a GPU; returns the state of each."""
    with gpu_jobs.only_one(folder):
        gpu_jobs.run_jobs(jobs, [gpu_jobs.Lane("cpu", (CORE,))], folder, seconds, **options)
    return {name: row["state"] for name, row in gpu_jobs.States(folder).last.items()}


def test_lanes_that_name_one_gpu_share_it(gpu_jobs: ModuleType) -> None:
    lanes = gpu_jobs.parse_lanes(["0:0-7", "1:8-11", "1:12"])
    assert [lane.is_alone for lane in lanes] == [True, False, False]
    assert lanes[1].cores == (8, 9, 10, 11)
    for wrong in (["0"], ["0:a-b"], ["0:7-3"], ["0:0-3", "1:3-5"]):
        with pytest.raises(ValueError, match="lane"):
            gpu_jobs.parse_lanes(wrong)


def test_times_are_measured_on_a_gpu_of_their_own(gpu_jobs: ModuleType) -> None:
    from gpu.lanes import next_job

    lanes = gpu_jobs.parse_lanes(["0:0", "1:1", "1:2"])
    rows, times, long = job("rows"), job("times", is_alone=True), job("long", seconds=100)
    assert next_job([rows, times], lanes[0], lanes, 60) is times
    assert next_job([times, rows], lanes[1], lanes, 60) is rows
    assert next_job([times], lanes[1], lanes, 60) is None
    assert next_job([rows, times], lanes[0], lanes[:1], 60) is rows, "with one lane, the order of the list counts"
    assert next_job([long], lanes[0], lanes, 60) is None
    assert next_job([job("long", seconds=100, resumes=True)], lanes[0], lanes, 60) is not None


def test_a_failing_or_late_job_costs_no_other_one(gpu_jobs: ModuleType, tmp_path: Path) -> None:
    record = """print('{{"command": "collect", "seconds": 2.5}}')"""
    jobs = [
        job("fails", "raise SystemExit(3)", "print('never')"),
        job("late", "import time; time.sleep(60)", limit=1),
        job(
            "works",
            record,
            "import os; print(os.environ['EDADM_RUN'])",
            files={"a": "b"},
        ),
    ]
    assert run(gpu_jobs, jobs, tmp_path) == {"fails": "failed", "late": "late", "works": "done"}
    assert not (tmp_path / "fails" / "1.out").exists(), "a chain ends where it fails"
    assert (tmp_path / "works" / "1.out").read_text().strip() == str(tmp_path / "works" / "runs" / "run")
    assert (tmp_path / "works" / "a").read_text() == "b"
    assert "| works | collect |  | 2.5 |" in gpu_jobs.report(jobs, tmp_path)
    before = (tmp_path / "states.jsonl").read_text()
    run(gpu_jobs, jobs, tmp_path)
    assert (tmp_path / "states.jsonl").read_text() == before, "nothing is run a second time by itself"
    assert run(gpu_jobs, [job("fails", "pass")], tmp_path, again=True)["fails"] == "done"


def test_all_processes_of_a_job_are_ended(gpu_jobs: ModuleType, tmp_path: Path) -> None:
    from gpu.lanes import MARK, end_processes

    own, other = (
        subprocess.Popen(["sleep", "60"], start_new_session=True, env={**os.environ, MARK: str(tmp_path / name)})
        for name in ("out/job", "out2/job")
    )
    end_processes(MARK, str(tmp_path / "out"))
    assert own.wait(10) == -9
    assert other.poll() is None
    other.kill()


def test_a_job_that_was_cut_goes_on(gpu_jobs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu.lanes.LEAST_SECONDS", 0)
    code = "import pathlib, time; pathlib.Path(r'{place}', 'rows').exists() or time.sleep(60)"
    jobs = [job("study", code, resumes=True), job("short", "pass")]
    assert run(gpu_jobs, jobs, tmp_path, seconds=0.5) == {"study": "cut"}
    (tmp_path / "study" / "rows").touch()
    assert run(gpu_jobs, jobs, tmp_path) == {"study": "done", "short": "done"}
    with (tmp_path / "states.jsonl").open("a") as file:
        file.write('{"job": "stud')  # a line that a kill has cut short
    from gpu.lanes import waiting_jobs

    states = gpu_jobs.States(tmp_path)
    states.last["short"]["state"] = "begun"
    new = job("new", "pass")
    assert waiting_jobs([*jobs, new], states, again=False) == [new, jobs[1]], "what the program was killed with is last"


def test_commands_that_have_ended_well_are_not_run_again(gpu_jobs: ModuleType, tmp_path: Path) -> None:
    first = "open(r'{place}/first', 'a').write('once')"
    second = "import pathlib, sys; sys.exit(not pathlib.Path(r'{place}', 'rows').exists())"
    jobs = [job("chain", first, second, resumes=True)]
    assert run(gpu_jobs, jobs, tmp_path) == {"chain": "failed"}
    (tmp_path / "chain" / "rows").touch()
    assert run(gpu_jobs, jobs, tmp_path, again=True) == {"chain": "done"}
    assert (tmp_path / "chain" / "first").read_text() == "once"


def test_an_archive_has_no_large_files(gpu_jobs: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    for name in ("states.jsonl", "a/0.out", "a/runs/large"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    gpu_jobs.pack(folder, tmp_path / "out.tgz")
    with tarfile.open(tmp_path / "out.tgz") as archive:
        assert sorted(info.name for info in archive if info.isfile()) == ["out/a/0.out", "out/states.jsonl"]


@pytest.mark.parametrize("smoke", [False, True])
def test_every_option_of_every_job_is_known(gpu_jobs: ModuleType, smoke: bool) -> None:
    flags = (ROOT / "docs" / "cli.md").read_text()
    jobs = gpu_jobs.read_jobs()
    assert len({each.name for each in jobs}) == len(jobs)
    for each in jobs:
        page, section = each.fills.partition(":")[0].split(", ", 1)
        assert re.search(rf"^#+ {section}$", (ROOT / "docs" / page).read_text(), re.MULTILINE), each.fills
        for number in range(len(each.lines(smoke))):
            program, *words = each.words(number, Path("out"), 100, "0", 4, smoke)
            assert program in ("python", "edadm")
            known = flags
            if program == "python" and words[0] == "-m":
                main = ROOT / words[1].replace(".", "/") / "__main__.py"
                known = main.read_text() if main.is_file() else flags
            elif program == "python":
                known = flags if words[0].endswith("within.py") else (ROOT / words[0]).read_text()
            for option in (word for word in words if word.startswith("--")):
                named = option in known or (words[0].endswith("quick_cost.py") and option in flags)
                assert named, f"{each.name}: {option}"


def test_the_table_of_programs_has_each_program_once() -> None:
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| \[?`(\w+\.py)`", text, re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in BENCHMARKS.glob("*.py"))


def test_states_are_lines_of_json(gpu_jobs: ModuleType, tmp_path: Path) -> None:
    run(gpu_jobs, [job("one", "pass")], tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "states.jsonl").read_text().splitlines()]
    assert [row["state"] for row in rows] == ["begun", "done"]
    assert rows[1]["codes"] == [0]


def test_mps_daemons_are_started_and_ended_where_the_program_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from study.mps import PROGRAM, mps_daemons

    monkeypatch.setenv("PATH", str(tmp_path))
    with mps_daemons(["0"]) as pipes:
        assert pipes == ""
    program, log = tmp_path / PROGRAM, tmp_path / "log"
    program.write_text(f'#!/bin/bash\nread line\necho "$1$line $CUDA_MPS_PIPE_DIRECTORY" >> {log}\n')
    program.chmod(0o755)
    with mps_daemons(["0", "3"]) as pipes:
        places = [f"{pipes}-{gpu}" for gpu in (0, 3)]
        assert all(Path(place).is_dir() for place in places)
    assert log.read_text().split() == ["-d", places[0], "-d", places[1], "quit", places[0], "quit", places[1]]
    assert not Path(places[0]).exists()
