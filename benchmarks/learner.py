"""Measures the learner: variants of a recipe on held-out trajectories, with several seeds and processes per GPU.

    python benchmarks/learner.py --out studies/learner --groups main,published --workers 24
    python benchmarks/learner.py --out studies/learner --table

One command collects trajectories once per model and seed, reconstructs every variant of `study/learner_variants.py`,
and judges it on trajectories that it has not learned from. Each job leaves one JSON file below OUT/results; the same
command skips what is there, so that a killed study goes on. Nothing is downloaded.

What is measured of each:

- `hard`, `soft`, `first`: losses of the units on the calibration set, summed: as deployed, before h is rounded to 0 or
  1, and with weights rounded to nearest; `undecided`: the share of weights with 0.05 < h < 0.95 when learning ended;
- `held_out`: the deployed loss on other trajectories, all steps alike, in the same units; against `hard` it shows how
  far the units overfit;
- `one_step`: relative L2 error of the prediction at the steps of full-precision trajectories; `guided` the same of the
  combination of both branches, where the model has guidance; `bias`: the share of the error's energy that is the mean
  error of each step and channel; `coherence`: the mean cosine between the errors of successive steps of a trajectory,
  0 where they are independent and 1 where they add up;
- `final`: relative L2 distance of final samples to those of full precision from the same noise, mean over images.

`--judge MODULE` names a module with a function `judge(folder, bits, seed, images, device)` whose mapping is added to
each result; `--variants FILE` a JSON file of further variants by label, which form the group `file`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learner_table import read_rows, table
from study.learner_variants import GROUPS, Group

if TYPE_CHECKING:
    from edadm_cli.artifacts import RunFolder
    from edadm_cli.recipe import Recipe

NUM_SAMPLES = 256  # of a calibration set with one sample per trajectory, where a variant does not say


@dataclass(frozen=True)
class Job:
    """One variant at one bit width with one seed.

    Without a variant, it is the collection that all jobs of a seed share; without bits, the sensitivity that all
    budgets of a variant with groups of one size share.
    """

    model: str
    seed: int
    label: str = ""
    variant: str = ""
    bits: str = ""
    group_size: int | None = None

    def file(self, out: Path) -> Path:
        """Returns the path of the result."""
        name = re.sub(r"[^a-z0-9.]+", "-", self.label.lower())
        bits = self.bits or f"sensitivity-g{self.group_size or 0}"
        return out / "results" / self.model / f"seed{self.seed}" / f"{name}-{bits}.json"

    def facts(self) -> dict[str, Any]:
        """Returns the fields that a result names."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Settings:
    """The settings that all jobs share."""

    out: Path
    scratch: Path
    trajectories: int
    images: int
    iterations: int | None
    judge: str | None


def variant_recipe(variant: str, iterations: int | None) -> tuple[Recipe, int]:
    """Returns a variant's recipe and the size of its calibration set; `iterations` replaces the recipe's number."""
    from edadm_cli.recipe import Recipe, load_recipe

    base, *changes = variant.split("+")
    fields, samples = load_recipe(base).model_dump(), None
    for change in changes:
        path, _, text = change.partition("=")
        value = json.loads(text) if re.fullmatch(r"[-0-9.]+|true|false|null|\[.*\]", text) else text
        if path == "samples":
            samples = int(value)
            continue
        *tables, name = path.split(".")
        table = fields
        for key in tables:
            table = table[key]
        table[name] = value
    if iterations is not None:
        fields["learn"]["iterations"] = min(iterations, fields["learn"]["iterations"] or iterations)
    recipe = Recipe.model_validate(fields)
    return recipe, samples or recipe.select.num_samples or NUM_SAMPLES * recipe.select.samples_per_trajectory


def shared_folder(settings: Settings, job: Job) -> RunFolder:
    """Returns the run with the trajectories that all jobs of a seed use."""
    from edadm_cli.artifacts import RunFolder

    return RunFolder(settings.scratch / "runs" / job.model / f"seed{job.seed}" / "shared")


def collect(settings: Settings, job: Job, device: str) -> None:
    """Samples the full-precision trajectories of a seed."""
    from edadm_cli.collect.stage import run
    from edadm_cli.config import CollectConfig

    config = CollectConfig(model=job.model, seed=job.seed, device=device, num_trajectories=settings.trajectories)
    run(config, shared_folder(settings, job))


def link_artifact(kind: str, source: RunFolder, target: RunFolder) -> None:
    """Makes an artifact of a run appear in another run; its files are hard links."""
    shutil.copytree(source.path(kind), target.path(kind), copy_function=os.link)


def link_collection(source: RunFolder, target: RunFolder) -> None:
    """Begins a run with the trajectories of another one, unless it has them."""
    if not target.path("collect").exists():
        shutil.rmtree(target.root, ignore_errors=True)
        target.root.mkdir(parents=True)
        link_artifact("collect", source, target)


def sensitivity_of(job: Job) -> Job | None:
    """Returns the measurement by which a job's budget of bits is spent; `None` for a job without a budget."""
    from edadm_cli.config import BitWidth

    bits = BitWidth.parse(job.bits) if job.bits else None
    return replace(job, bits="", group_size=bits.group_size) if bits is not None and bits.is_mixed else None


def begun_folder(settings: Settings, job: Job) -> RunFolder:
    """Returns a job's run with what it shares with others: the trajectories, and the sensitivity of its variant."""
    from edadm_cli.artifacts import RunFolder

    folder = RunFolder(settings.scratch / "runs" / job.model / f"seed{job.seed}" / job.file(settings.out).stem)
    link_collection(shared_folder(settings, job), folder)
    measured = sensitivity_of(job)
    if measured is not None and not folder.has("sensitivity"):
        for kind in ("select", "sensitivity"):
            shutil.rmtree(folder.path(kind), ignore_errors=True)
            link_artifact(kind, begun_folder(settings, measured), folder)
    return folder


def prepare(settings: Settings, job: Job, device: str) -> tuple[RunFolder, Recipe]:
    """Selects the calibration set of a variant, unless that is linked; returns the run and the recipe."""
    from edadm_cli.config import SelectConfig
    from edadm_cli.select.stage import run as select

    recipe, samples = variant_recipe(job.variant, settings.iterations)
    folder = begun_folder(settings, job)
    chosen = {name: value for name, value in recipe.select.model_dump().items() if value is not None}
    samples = samples if settings.trajectories >= NUM_SAMPLES else min(samples, settings.trajectories)  # a trial
    select(SelectConfig(seed=job.seed, device=device, **{**chosen, "num_samples": samples}), folder)
    return folder, recipe


def measure_sensitivity(settings: Settings, job: Job, device: str) -> None:
    """Measures the sensitivity of a variant's layers, which does not depend on the budget."""
    from edadm_cli.config import SensitivityConfig
    from edadm_cli.sensitivity.stage import run

    folder, recipe = prepare(settings, job, device)
    run(SensitivityConfig(recipe=recipe, group_size=job.group_size, seed=job.seed, device=device), folder)


def measure(settings: Settings, job: Job, device: str) -> dict[str, Any]:
    """Selects, reconstructs and judges one variant."""
    from study.learner_judge import judge

    from edadm_cli.artifacts import Selection
    from edadm_cli.config import BitWidth, ReconstructConfig
    from edadm_cli.reconstruct.stage import run as reconstruct

    folder, recipe = prepare(settings, job, device)
    bits, shared = BitWidth.parse(job.bits), {"seed": job.seed, "device": device}
    learned = reconstruct(ReconstructConfig(bits=bits, recipe=recipe, batch_size=128, **shared), folder)
    result = {
        "counts": list(Selection.load(folder.open("select")).counts),
        "seconds": learned.seconds,
        "first": learned.loss.first,
        "soft": learned.loss.soft,
        "hard": learned.loss.last,
        "undecided": learned.loss.undecided,
        "warnings": list(learned.warnings),
        **judge(folder, str(bits), job.seed, settings.images, device),
    }
    if settings.judge is not None:
        more = importlib.import_module(settings.judge)
        result |= more.judge(folder, str(bits), job.seed, settings.images, device)
    shutil.rmtree(folder.root)
    return result


def begin(devices: Any) -> None:
    """Gives a process of the pool its device: it sees one GPU alone, through MPS where a pipe is given."""
    name, _, pipe = devices.get().partition("@")
    os.environ["EDADM_STUDY_NAME"] = f"{name}{' mps' if pipe else ''}"
    if name == "cpu":
        os.environ["EDADM_STUDY_DEVICE"] = "cpu"
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = "0" if pipe else name
        os.environ["EDADM_STUDY_DEVICE"] = "cuda:0"
        if pipe:
            os.environ["CUDA_MPS_PIPE_DIRECTORY"] = pipe
    import torch

    torch.set_num_threads(1)


def work(task: tuple[Settings, Job]) -> dict[str, Any]:
    """Runs one job; a failure is printed, and its job is run again by the next command."""
    settings, job = task
    device, started = os.environ["EDADM_STUDY_DEVICE"], time.monotonic()
    try:
        if not job.variant:
            collect(settings, job, device)
            return job.facts()
        if not job.bits:
            measure_sensitivity(settings, job, device)
            return job.facts()
        result = {**job.facts(), **measure(settings, job, device)}
    except Exception as error:  # noqa: BLE001 - one failed job must not end the study
        return {**job.facts(), "error": f"{type(error).__name__}: {error}"}
    result |= {
        "job_seconds": round(time.monotonic() - started, 1),
        "device": os.environ["EDADM_STUDY_NAME"],
        "card": card(device),
    }
    path = job.file(settings.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(result), encoding="utf-8")
    aside.replace(path)
    return {
        name: result[name]
        for name in ("model", "seed", "label", "bits", "hard", "one_step", "final", "job_seconds", "device")
    }


def card(device: str) -> str:
    """Returns the name of what computes."""
    import torch

    return "CPU" if device == "cpu" else torch.cuda.get_device_name(device)


def groups_of(options: argparse.Namespace) -> list[Group]:
    """Returns the chosen groups with their seeds; `main:0,ingredients:0-1,main` names some seeds before the others."""
    groups = dict(GROUPS)
    if options.variants is not None:
        groups["file"] = Group(json.loads(options.variants.read_text(encoding="utf-8")))
    chosen = []
    for text in options.groups.split(","):
        name, _, seeds = text.partition(":")
        group = groups[name]
        widths = tuple(options.bits.split(",")) if options.bits else group.widths
        chosen.append(Group(group.variants, widths, seeds_of(seeds or options.seeds) or group.seeds))
    return chosen


def seeds_of(text: str) -> tuple[int, ...]:
    """Returns the seeds of `0-4` or `3`."""
    if not text:
        return ()
    first, _, last = text.partition("-")
    return tuple(range(int(first), int(last or first) + 1))


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """Returns all jobs, each once, in the order of the groups and in them of the seeds."""
    jobs = [
        Job(model, seed, label, variant, bits)
        for group in groups_of(options)
        for seed in group.seeds
        for bits in group.widths
        for label, variant in group.variants.items()
        for model in options.models.split(",")
    ]
    return list(dict.fromkeys(job for job in jobs if re.search(options.only, job.label)))


def run_study(options: argparse.Namespace, settings: Settings) -> None:
    """Collects each seed, measures the sensitivity of each variant with a budget, then runs what is not finished."""
    jobs = [job for job in jobs_of(options) if not job.file(settings.out).is_file()]
    collections = dict.fromkeys(Job(job.model, job.seed) for job in jobs)
    sensitivities = dict.fromkeys(measured for job in jobs if (measured := sensitivity_of(job)) is not None)
    context = multiprocessing.get_context("spawn")
    devices, names = context.Queue(), device_names(options.devices)
    for index in range(options.workers):
        devices.put(names[index % len(names)])
    with context.Pool(options.workers, begin, (devices,)) as pool:
        for group in (collections, sensitivities, jobs):
            for result in pool.imap_unordered(work, [(settings, job) for job in group]):
                print(json.dumps(result), file=sys.stderr, flush=True)
        pool.close()
        pool.join()


def device_names(text: str) -> list[str]:
    """Returns the GPUs as CUDA_VISIBLE_DEVICES names them, or `cpu`."""
    import torch

    if text != "auto":
        return text.split(",")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    return visible.split(",") if torch.cuda.is_available() else ["cpu"]


def main() -> None:
    """Reads the command line and runs the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, help="folder of the runs while they are measured; by default OUT")
    parser.add_argument("--models", default="digits-ddpm,digits-sd")
    parser.add_argument("--groups", default=",".join(GROUPS), help="such as main:0,ingredients:0-1,main")
    parser.add_argument("--only", default="", help="regular expression that the labels of variants match")
    parser.add_argument("--variants", type=Path, help="JSON file of further variants by label: the group 'file'")
    parser.add_argument("--bits", default="", help="bit widths of all groups; else each group's own")
    parser.add_argument("--seeds", default="", help="such as 0-4, of groups that name none; else each group's own")
    parser.add_argument("--trajectories", type=int, default=NUM_SAMPLES, help="number of trajectories per collection")
    parser.add_argument("--images", type=int, default=128, help="held-out trajectories")
    parser.add_argument("--iterations", type=int, help="at most so many optimizer steps per unit: for a trial")
    parser.add_argument(
        "--devices",
        default="auto",
        help="cpu, or numbers of GPUs such as 0,1; auto takes all that are visible; 0@FOLDER is a GPU through the MPS"
        " daemon with that pipe folder",
    )
    parser.add_argument("--workers", type=int, default=1, help="jobs at a time, over all devices")
    parser.add_argument("--judge", help="a module that measures more of each job")
    parser.add_argument("--table", action="store_true", help="print the tables of what is finished, run nothing")
    options = parser.parse_args()
    settings = Settings(
        options.out,
        options.scratch or options.out,
        options.trajectories,
        options.images,
        options.iterations,
        options.judge,
    )
    if not options.table:
        run_study(options, settings)
    print(table(read_rows([options.out])))


if __name__ == "__main__":
    main()
