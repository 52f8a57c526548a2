"""What all rows of `benchmarks/emoji.py` with a model and a seed share: trajectories, full precision, sensitivity.

Several processes work on a study; `ready` lets the first one that needs something make it, and the others wait.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study.emoji_rows import FULL_PRECISION, SMALL_MODEL, TRAJECTORIES, Row
from study.rows_of_run import load_widths

if TYPE_CHECKING:
    from edadm_cli.artifacts import RunFolder
    from study.emoji_judge import Judge


@dataclass(frozen=True)
class Study:
    """The folder of the study, its sizes, and the folder of `ddpm-emoji`; `keep` leaves what rows learned."""

    out: Path
    images: int
    held_out: int
    batch: int
    trajectories: int | None
    iterations: int | None
    expected: float
    device: str
    small: Path | None = None
    keep: bool = False

    def source(self, model: str) -> str:
        """Returns what `edadm collect` takes as a model: its name, or the folder of `ddpm-emoji`."""
        return str(self.small) if model == SMALL_MODEL else model

    def of(self, row: Row) -> Study:
        """Returns the study whose trajectories a row learns from: one inside this one if they are more than usual."""
        count = TRAJECTORIES.get(row.label)
        if count is None or self.trajectories is not None:  # in a trial, all rows have few
            return self
        return replace(self, out=self.out / f"{count}-trajectories", trajectories=count)

    def judge(self, model: str) -> Judge:
        """Returns the judge of a model's pictures."""
        from study.emoji_judge import judge

        return judge(self.device, self.small if model == SMALL_MODEL else None)

    def shared(self, model: str, seed: int) -> Path:
        """Returns the folder of what all rows of a model and a seed use."""
        return self.out / "runs" / f"{model}-{seed}"

    def measured(self, model: str, seed: int) -> RunFolder:
        """Returns the run with the sensitivity that rows with mixed bits share."""
        from edadm_cli.artifacts import RunFolder

        return RunFolder(self.out / "runs" / f"{model}-{seed}-sensitivity")

    def result(self, row: Row) -> Path:
        """Returns the file of a finished row; the number of pictures is part of its name."""
        return self.out / "results" / f"{row.name}-{self.images}.json"


def collect_trajectories(study: Study, model: str, seed: int) -> dict[str, Any]:
    """Collects the trajectories of a seed, from which all its rows learn."""
    from edadm_cli.artifacts import RunFolder
    from edadm_cli.collect.stage import run
    from edadm_cli.config import CollectConfig

    config = CollectConfig(
        model=study.source(model), seed=seed, device=study.device, num_trajectories=study.trajectories
    )
    run(config, RunFolder(study.shared(model, seed)))
    return {"model": model, "seed": seed}


def measure_sensitivity(study: Study, model: str, seed: int) -> dict[str, Any]:
    """Measures the error of each layer at each number of bits, for the rows with mixed bits."""
    from edadm_cli.artifacts import RunFolder
    from study.emoji_budget import measure_layers

    started, folder = time.monotonic(), study.measured(model, seed)
    measure_layers(RunFolder(study.shared(model, seed)), folder, seed, study.device, study.trajectories)
    return {"model": model, "seed": seed, "seconds": round(time.monotonic() - started, 1)}


def generate_exact(study: Study, model: str, seed: int) -> dict[str, Any]:
    """Generates the full-precision pictures of a seed, and judges them."""
    from edadm_cli.artifacts import RunFolder
    from edadm_cli.models.collected import CollectedRun
    from study.emoji_judge import generate, labels, prompts_of, save_exact, save_sheet

    started, folder = time.monotonic(), RunFolder(study.shared(model, seed))
    exact, collected = load_widths(folder.root, ("",), study.device)[""], CollectedRun.open(folder)
    pictures, latents = generate(exact, collected, seed, study.images, study.batch)
    judged = study.judge(model)
    features = judged.features(pictures)
    save_exact(folder, pictures, latents, features)
    save_sheet(pictures, study.out / "pictures" / f"{model}-full-precision-{seed}.webp")
    facts = {"model": model, "seed": seed, "label": FULL_PRECISION, "bits": "", "images": study.images}
    facts["card"] = card(study.device)
    facts["row_seconds"] = round(time.monotonic() - started, 1)
    return {**facts, **judged.metrics(features, labels(prompts_of(collected, study.images, seed)))}


def card(device: str) -> str:
    """Returns the name of what computes."""
    import torch

    return "CPU" if device == "cpu" else torch.cuda.get_device_name(device)


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(content), encoding="utf-8")
    aside.replace(path)


def claim(study: Study, name: str) -> bool:
    """Returns whether this process is the first to take a piece of work in this run."""
    folder = study.out / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (folder / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def exact_pictures(study: Study, row: Row, wait: bool = True) -> None:
    """Generates the full-precision pictures of a row's model and seed, or waits for the process that does so."""
    (ready if wait else make_unclaimed)(study, row.model, row.seed, f"pictures-{study.images}", generate_exact)


Maker = Callable[[Study, str, int], dict[str, Any]]


def make_unclaimed(study: Study, model: str, seed: int, kind: str, make: Maker) -> Path:
    """Makes something that all rows of a model and seed share, unless a process does so; returns the file about it."""
    path = study.shared(model, seed) / f"{kind}.json"
    if not path.is_file() and claim(study, f"{model}-{seed}-{kind}"):
        result = make(study, model, seed)
        if "label" in result:
            write(study.result(Row(model, seed, FULL_PRECISION, "")), result)
        write(path, result)
        say(kind, **result)
    return path


def ready(study: Study, model: str, seed: int, kind: str, make: Maker) -> None:
    """Waits for something that all rows of a model and seed share, or makes it."""
    path = make_unclaimed(study, model, seed, kind, make)
    while not path.is_file():
        time.sleep(0.5)


def say(event: str, **facts: Any) -> None:
    """Prints a line of the log."""
    short = {name: round(value, 5) if isinstance(value, float) else value for name, value in facts.items()}
    print(json.dumps({"time": time.strftime("%H:%M:%S"), "event": event, **short}), flush=True)
