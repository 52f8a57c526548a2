"""The jobs of `benchmarks/gpu_jobs.py`, which are listed in `benchmarks/gpu_jobs.toml`."""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1]
REPOSITORY = BENCHMARKS.parent


@dataclass(frozen=True)
class Job:
    """One measurement.

    Args:
        name: Its name.
        fills: The page and the section that its results belong to.
        commands: What it runs, one command after the other.
        seconds: About how long it takes; it is begun only while so much time is left, unless it resumes.
        limit: Its time limit in seconds.
        is_alone: Whether it measures times, so that nothing else may use its GPU.
        resumes: Whether it goes on where it was stopped, when it is run again.
        values: What its commands name in braces, at full size.
        tiny: The same on a CPU.
        tiny_model: A builder of a tiny pipeline, which the tiny form writes to `{runs}/model` first.
        files: Text files that are written to `{place}` first.
    """

    name: str
    fills: str
    commands: tuple[str, ...]
    seconds: int
    limit: int
    is_alone: bool = False
    resumes: bool = False
    values: Mapping[str, str] = field(default_factory=dict)
    tiny: Mapping[str, str] = field(default_factory=dict)
    tiny_model: str = ""
    files: Mapping[str, str] = field(default_factory=dict)

    def lines(self, smoke: bool) -> tuple[str, ...]:
        """Returns the commands of the full or of the tiny form, before what they name in braces is replaced."""
        first = f"python benchmarks/tiny_models.py {self.tiny_model} {{runs}}/model"
        return (first, *self.commands) if smoke and self.tiny_model else self.commands

    def words(self, number: int, place: Path, left: int, gpu: str, workers: int, smoke: bool) -> list[str]:
        """Returns the words of a command.

        Args:
            number: Its position among `lines`.
            place: The folder of the job's results.
            left: Seconds until the job is stopped.
            gpu: The number of the GPU.
            workers: Number of processes for which there are cores.
            smoke: Whether the tiny form runs.
        """
        names = {
            "place": str(place),
            "runs": str(place / "runs"),
            "device": "cpu" if smoke else "cuda",
            "gpu": "cpu" if smoke else gpu,
            "workers": "1" if smoke else str(workers),
            "left": str(left),
            "smoke": "--smoke" if smoke else "",
        }
        values = {**self.values, **(self.tiny if smoke else {})}
        names |= {name: value.format(**names) for name, value in values.items()}
        return shlex.split(self.lines(smoke)[number].format(**names))


def read_jobs(path: Path = BENCHMARKS / "gpu_jobs.toml") -> list[Job]:
    """Returns the jobs of a file, those that matter most first; `each` makes a job per file of a pattern."""
    jobs = []
    for table in tomllib.loads(path.read_text(encoding="utf-8"))["job"]:
        table["commands"] = tuple(table["commands"])
        table["is_alone"] = table.pop("alone", False)
        pattern = table.pop("each", None)
        if pattern is None:
            jobs.append(Job(**table))
            continue
        for file in sorted(REPOSITORY.glob(pattern)):
            short = file.stem.removeprefix("test_").removesuffix("_cuda").replace("_", "-")
            values = {**table.get("values", {}), "file": str(file.relative_to(REPOSITORY))}
            jobs.append(Job(**{**table, "name": f"{table['name']}-{short}", "values": values}))
    return jobs
