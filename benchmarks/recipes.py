"""Compares recipes: every recipe, bit width and seed goes through the whole chain; prints a table of means and spreads.

    python benchmarks/recipes.py --model digits-sd --out studies/digits-sd
    python benchmarks/recipes.py --model digits-sd --out studies/digits-sd --table

Each finished job adds one line of JSON to `OUT/results.jsonl`; the same command skips finished jobs, so that a killed
study goes on. Beside the shipped recipes there are five that are `default` with something changed: `tdac-only` (no
losses of the layers inside a block), `fbr-only` (equal counts over the steps), `neither` (both of these), `ranges-only`
(nothing is learned), and `quantized-edges` (the inputs of the first and the last layer are quantized too). `relative-G`
and `absolute-G` are `default` with the losses of the layers inside a block weighted by G, scaled to the block's output
or not.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edadm_cli.artifacts import RunFolder
from edadm_cli.config import BitWidth, CollectConfig, EvaluateConfig, ExportConfig, ReconstructConfig, SelectConfig
from edadm_cli.recipe import Recipe, load_recipe

RECIPES = ("rtn", "ptq4dm", "q-diffusion", "paper", "default")
ABLATIONS = ("tdac-only", "fbr-only", "neither", "ranges-only", "quantized-edges")
FULL_PRECISION = ("evaluate", "full-precision")
COLUMNS = ("latent_rel_l2", "frechet_distance", "prompt_accuracy", "reconstruct_seconds")


@dataclass(frozen=True)
class Job:
    """One recipe at one bit width with one seed; with `None` as recipe, the trajectories that a seed's jobs share."""

    model: str
    seed: int
    recipe: str | None
    bits: str | None


@dataclass(frozen=True)
class Settings:
    """The settings that all jobs share."""

    out: Path
    device: str
    num_images: int
    batch_size: int
    iterations: int | None
    threads: int


def study_recipe(name: str, iterations: int | None) -> Recipe:
    """Returns a shipped recipe, or `default` with a change; `iterations` replaces the number of the recipe."""
    scaling, _, weight = name.partition("-")
    weighted = scaling in ("relative", "absolute")
    recipe = load_recipe("default" if weighted or name in ABLATIONS else name)
    learn, select, edges = recipe.learn, recipe.select, {}
    if weighted:
        changes = {"layer_loss_weight": float(weight), "relative_layer_losses": scaling == "relative"}
        learn = learn.model_copy(update=changes)
    if name in ("tdac-only", "neither"):
        learn = learn.model_copy(update={"layer_loss_weight": 0.0})
    if name in ("fbr-only", "neither"):
        select = select.model_copy(update={"strategy": "uniform"})
    if name == "ranges-only":
        learn = learn.model_copy(update={"granularity": "none"})
    if name == "quantized-edges":
        edges = {"sample_float_input": False, "output_float_input": False}
    if iterations is not None:
        learn = learn.model_copy(update={"iterations": iterations})
    return recipe.model_copy(update={"name": name, "learn": learn, "select": select, **edges})


def shared_folder(settings: Settings, job: Job) -> RunFolder:
    """Returns the folder of the trajectories and full-precision images that all jobs of a seed use."""
    return RunFolder(settings.out / f"seed{job.seed}" / "shared")


def collect(settings: Settings, job: Job) -> None:
    """Collects the full-precision trajectories of a seed."""
    from edadm_cli.collect.stage import run

    config = CollectConfig(model=job.model, seed=job.seed, device=settings.device)
    run(config, shared_folder(settings, job))


def link_artifact(source: RunFolder, target: RunFolder, kind: str, name: str | None = None) -> None:
    """Makes a finished artifact appear in another run, at once and whole; its files are hard links."""
    place = target.path(kind, name)
    if source.has(kind, name) and not place.exists():
        aside = place.with_name(f".{place.name}.linked-{os.getpid()}")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source.path(kind, name), aside, copy_function=os.link)
        try:
            aside.rename(place)
        except OSError:  # another job was first
            shutil.rmtree(aside)


def measure(settings: Settings, job: Job) -> dict[str, Any]:
    """Runs one job through select, reconstruct, export and evaluate."""
    from edadm_cli.evaluate.stage import run as evaluate
    from edadm_cli.export.stage import run as export
    from edadm_cli.reconstruct.stage import run as reconstruct
    from edadm_cli.select.stage import run as select

    assert job.recipe is not None
    assert job.bits is not None
    bits, recipe = BitWidth.parse(job.bits), study_recipe(job.recipe, settings.iterations)
    common = shared_folder(settings, job)
    folder = RunFolder(settings.out / f"seed{job.seed}" / f"{job.recipe}-{job.bits}")
    link_artifact(common, folder, "collect")
    link_artifact(common, folder, *FULL_PRECISION)
    shared = {"seed": job.seed, "device": settings.device}
    chosen = {name: value for name, value in recipe.select.model_dump().items() if value is not None}
    selected = select(SelectConfig(**chosen, **shared), folder)
    learned = reconstruct(ReconstructConfig(bits=bits, recipe=recipe, batch_size=128, **shared), folder)
    exported = export(ExportConfig(bits=bits, **shared), folder)
    metrics = ("frechet_distance", "prompt_accuracy") if job.model == "digits-sd" else ("frechet_distance",)
    judged = evaluate(
        EvaluateConfig(
            bits=bits, num_images=settings.num_images, batch_size=settings.batch_size, metrics=metrics, **shared
        ),
        folder,
    )
    link_artifact(folder, common, *FULL_PRECISION)
    return {
        **asdict(job),
        "iterations": settings.iterations,
        "reconstruct_seconds": learned.seconds,
        "other_seconds": {
            "select": selected.seconds,
            "export": exported.seconds,
            "evaluate": judged.seconds,
        },
        "loss": learned.loss.model_dump(),
        "denoiser_ratio": exported.size_mib["ratio"],
        "latent_rel_l2": judged.distance_to_full_precision.latent_rel_l2,
        "psnr_db": judged.distance_to_full_precision.psnr_db,
        **{name: metric.value for name, metric in judged.metrics.items()},
        "full_precision": {name: metric.value for name, metric in judged.full_precision.items()},
    }


def work(task: tuple[Settings, Job]) -> dict[str, Any]:
    """Runs one job in a separate process; a failure is a result, too."""
    import torch

    settings, job = task
    torch.set_num_threads(settings.threads)
    started = time.monotonic()
    try:
        if job.recipe is None:
            collect(settings, job)
        result = asdict(job) if job.recipe is None else measure(settings, job)
    except Exception as error:  # noqa: BLE001 - one failed job must not end the study
        result = {**asdict(job), "error": f"{type(error).__name__}: {error}"}
    return {**result, "seconds": round(time.monotonic() - started, 1)}


def jobs_of(
    model: str, seeds: list[int], bits: list[str], recipes: list[str], ablations: list[str], ablation_bits: list[str]
) -> list[Job]:
    """Returns all jobs, one seed after another."""
    jobs = []
    for seed in seeds:
        jobs += [Job(model, seed, recipe, width) for recipe in recipes for width in bits]
        jobs += [Job(model, seed, recipe, width) for recipe in ablations for width in ablation_bits]
    return jobs


def read_results(out: Path) -> list[dict[str, Any]]:
    """Returns the finished jobs of a study."""
    path = out / "results.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [result for result in map(json.loads, lines) if "error" not in result and result["recipe"] is not None]


def table(results: list[dict[str, Any]]) -> str:
    """Returns means over the seeds and sample standard deviations as a Markdown table."""
    rows = defaultdict(list)
    for result in results:
        rows[result["bits"], result["recipe"]].append(result)
        rows["full precision", ""].append({"seed": result["seed"], **result["full_precision"]})
    lines = ["| bits | recipe | seeds | " + " | ".join(COLUMNS) + " |", "|---|---|---|" + "---|" * len(COLUMNS)]
    for (bits, recipe), results in sorted(rows.items(), key=lambda row: (row[0][0] != "full precision", row[0])):
        by_seed = {result["seed"]: result for result in results}
        cells = [_cell([result[name] for result in by_seed.values() if name in result]) for name in COLUMNS]
        lines.append(f"| {bits} | {recipe} | {len(by_seed)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{spread}"


def run_study(options: argparse.Namespace, settings: Settings) -> None:
    """Collects each seed and generates its full-precision images during one job, then runs what is not finished."""
    seeds = [int(seed) for seed in options.seeds.split(",")]
    lists = (options.bits, options.recipes, options.ablations, options.ablation_bits)
    jobs = jobs_of(options.model, seeds, *([word for word in names.split(",") if word] for names in lists))
    finished = {(result["seed"], result["recipe"], result["bits"]) for result in read_results(settings.out)}
    jobs = [job for job in jobs if (job.seed, job.recipe, job.bits) not in finished]
    settings.out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.workers) as pool, (settings.out / "results.jsonl").open("a", encoding="utf-8") as log:
        open_seeds = sorted({job.seed for job in jobs})
        collections = [Job(options.model, seed, None, None) for seed in open_seeds]
        pioneers = [next(job for job in jobs if job.seed == seed) for seed in open_seeds]
        for group in (collections, pioneers, [job for job in jobs if job not in pioneers]):
            for result in pool.imap_unordered(work, [(settings, job) for job in group]):
                log.write(json.dumps(result) + "\n")
                log.flush()
                print(json.dumps(result), file=sys.stderr, flush=True)
        pool.close()
        pool.join()


def main() -> None:
    """Reads the command line and runs the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits-sd")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--bits", default="w8a8,w4a8,w4a4")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--ablations", default=",".join(ABLATIONS))
    parser.add_argument("--ablation-bits", default="w4a8", help="bit widths of the ablations")
    parser.add_argument("--iterations", type=int, help="optimizer steps per unit for every recipe that learns")
    parser.add_argument("--num-images", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=500, help="images sampled together")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=1, help="number of jobs at a time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per job")
    parser.add_argument("--table", action="store_true", help="print the table of what is finished, run nothing")
    options = parser.parse_args()
    settings = Settings(
        options.out, options.device, options.num_images, options.batch_size, options.iterations, options.threads
    )
    if not options.table:
        run_study(options, settings)
    print(table(read_results(options.out)))


if __name__ == "__main__":
    main()
