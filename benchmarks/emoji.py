"""Study quantization on the emoji models: recipes, bit widths and seeds, with every metric of quality.

    python benchmarks/emoji.py --out studies/emoji --gpus 0,1 --workers 14
    python benchmarks/emoji.py --out studies/emoji --table
    python benchmarks/emoji.py --out studies/emoji --rows docs/data/emoji.jsonl --gpus 0 --workers 7 --images 500
    python benchmarks/emoji.py --out studies/emoji --rows docs/data/emoji.jsonl --images 500 --export FILE
    python benchmarks/emoji.py --out studies/emoji --models ddpm-emoji --ddpm-emoji training/weights/ddpm-emoji --gpus 0
    python benchmarks/emoji.py --rows docs/data/emoji.jsonl --table
    python benchmarks/emoji.py --out studies/emoji --picture emoji-sd.webp

A row is one variant of a recipe (`benchmarks/learner.py` says how a variant is written) on one model, at one bit width,
with one seed. Each row leaves one JSON file below OUT/results; the same command skips rows that exist, so that an
interrupted study continues, in the middle of a row if OUT/runs is still there. `--rows` names rows that were measured
before, which are skipped as well, if they have as many pictures. With `--keep` the quantized models stay in OUT/runs,
so that a later command with another number of pictures measures them without learning again. Rows come in the order of
their importance, but none is begun that would not end within `--seconds`, by the times of the rows before it. Nothing
is downloaded.

Metrics of a row, over `--images` pictures of one seed each. No calibration has seen their noise, but the first prompts
are those of the calibration trajectories, because `collect` and `evaluate` draw them with the same seed:

- `one_step`, `guided`: relative L2 error of single predictions on other full-precision trajectories (`--held-out`
  of them), of both branches and of the guided combination; `held_out`: loss of the units on them;
- `final`: relative L2 distance of the final latent to full precision of the same seed, mean over the pictures;
  `final_new`: over those whose prompt no trajectory of the collection has, where they are 100 or more;
- `ssim`, `perceptual`, `perceptual_imagenet`: comparison of the pictures with full precision of the same seed; the last
  two use the features of the emoji encoder and of EfficientNet-Lite0;
- `frechet`, `frechet_spatial`: distance to the training pictures, in the features of the emoji encoder;
  `frechet_imagenet`, `kernel_imagenet`: distance to the 967 pictures with held-out names, in the features of
  EfficientNet-Lite0. The pictures of `ddpm-emoji` are compared with real ones of their size, 32x32;
- `top1`, `top5`: share of the pictures whose name ranks first, or among the first five, of 500.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learner import link_collection, variant_recipe
from learner_table import listed
from study.emoji_rows import KEYS, MODELS, SMALL_MODEL, Row, rows_in_order
from study.emoji_shared import (
    Study,
    card,
    claim,
    collect_trajectories,
    exact_pictures,
    make_unclaimed,
    measure_sensitivity,
    ready,
    say,
    write,
)
from study.emoji_steps import table as steps_table
from study.emoji_summary import table as summary_table
from study.emoji_table import export, read_results, table
from study.mps import mps_daemons
from study.rows_of_run import load_widths

if TYPE_CHECKING:
    from edadm_cli.models.collected import CollectedRun
    from edadm_cli.models.loaded import LoadedModel

BUDGET_MIB, LARGEST_BUDGET_MIB = 4096, 24576  # memory of a row's inputs and targets: for 256 samples, and at most


# One row


def measure(study: Study, row: Row) -> dict[str, Any]:
    """Selects, reconstructs and judges one row."""
    from study.emoji_budget import VARIANT, choose_samples, link_sensitivity
    from study.emoji_judge import generate, labels, load_exact, new_prompts, paired, prompts_of, save_sheet

    from edadm_cli.artifacts import RunFolder
    from edadm_cli.config import BitWidth, ReconstructConfig
    from edadm_cli.models.collected import CollectedRun
    from edadm_cli.reconstruct.stage import run as reconstruct

    started = time.monotonic()
    recipe, samples = variant_recipe(row.variant, study.iterations)
    source, folder = RunFolder(study.shared(row.model, row.seed)), RunFolder(study.out / "runs" / row.name)
    link_collection(source, folder)
    counts = choose_samples(folder, row.variant, row.seed, study.device, study.trajectories)
    bits = BitWidth.parse(row.bits)
    if bits.is_mixed:
        assert row.variant == VARIANT, "the measured layers are those of another recipe"
        make_unclaimed(study, row.model, row.seed, "sensitivity", measure_sensitivity)
        exact_pictures(study, row, wait=False)  # while another process measures
        ready(study, row.model, row.seed, "sensitivity", measure_sensitivity)
        link_sensitivity(study.measured(row.model, row.seed), folder)
    budget = min(BUDGET_MIB * max(1, samples // 256), LARGEST_BUDGET_MIB)
    places = {"seed": row.seed, "device": study.device, "memory_budget_mib": budget}
    learned = reconstruct(ReconstructConfig(bits=bits, recipe=recipe, batch_size=128, **places), folder)
    learned_at = time.monotonic()
    say("learned", row=row.name, seconds=learned_at - started)
    exact_pictures(study, row)
    artifact = folder.open("reconstruct", str(bits))
    collected, models = CollectedRun.open(folder), load_widths(folder.root, ("", str(bits)), study.device)
    exact, quantized = models[""], models[str(bits)]
    errors = step_errors(study, row, exact, quantized, collected, artifact)
    pictures, latents = generate(quantized, collected, row.seed, study.images, study.batch)
    judged = study.judge(row.model)
    features = judged.features(pictures)
    alone = judged.metrics(features, labels(prompts_of(collected, len(pictures), row.seed)))
    is_new = new_prompts(collected, len(pictures), row.seed)
    if row.seed == 0:
        save_sheet(pictures, study.out / "pictures" / f"{row.name}.webp")
    if not study.keep:
        shutil.rmtree(folder.root)
    return {
        "card": card(study.device),
        "recipe": recipe.model_dump(mode="json"),
        "counts": list(counts),
        "loss": learned.loss.model_dump(),
        "reconstruct_seconds": learned.seconds,
        "judge_seconds": round(time.monotonic() - learned_at, 1),
        "row_seconds": round(time.monotonic() - started, 1),
        **errors,
        "images": len(pictures),
        **paired(pictures, latents, features, load_exact(source, len(pictures)), is_new, study.device),
        **alone,
    }


def step_errors(
    study: Study, row: Row, exact: LoadedModel, quantized: LoadedModel, collected: CollectedRun, artifact: Any
) -> dict[str, Any]:
    """Returns the errors of single steps on full-precision trajectories that were not learned from."""
    from study.emoji_judge import prompts_of
    from study.learner_judge import one_step_errors

    from edadm_cli.artifacts import Units
    from edadm_cli.models.pipeline_calls.sampling import sample
    from edadm_cli.models.pipeline_calls.seeds import EVALUATION, image_seed

    count = min(study.held_out, study.images)
    names = [unit.name for unit in Units.load(artifact).units]
    with one_step_errors(exact, quantized.denoiser, names, collected.guidance_scale) as errors:
        sample(
            exact,
            seeds=[image_seed(row.seed, number, EVALUATION) for number in range(count)],
            prompts=prompts_of(collected, count, row.seed),
            num_steps=collected.num_steps,
            guidance_scale=collected.guidance_scale,
        )
    return {name: value for name, value in errors.summary().items() if name != "by_unit"}


# Workers


def seconds_of_length(study: Study) -> dict[str, float]:
    """Returns per model how long a row with 300 iterations takes at most, from finished rows with as many pictures."""
    times: dict[str, float] = {}
    for path in (study.out / "times").glob(f"*-{study.images}.json"):
        row = json.loads(path.read_text())
        times[row["model"]] = max(times.get(row["model"], 0), row["row_seconds"] / row["length"])
    return times


def work(study: Study, rows: list[Row], until: float, prefers_learning: bool) -> None:
    """Takes one row after the other until none is left or the time is over."""
    from edadm_cli.models.loading import resolve_device

    resolve_device(study.device)  # which turns TF32 off: rows learn in it, but all pictures are sampled in float32
    while True:
        left, times = until - time.time(), seconds_of_length(study)
        open_rows = [row for row in rows if not study.result(row).is_file()]
        open_rows = [row for row in open_rows if 1.1 * row.length * times.get(row.model, study.expected) < left]
        open_rows.sort(key=lambda row: (row.iterations > 0) != prefers_learning)
        row = next((row for row in open_rows if claim(study, row.name)), None)
        if row is None:
            return
        try:
            ready(study.of(row), row.model, row.seed, "trajectories", collect_trajectories)
            say("begun", row=row.name)
            if not row.bits:
                exact_pictures(study, row)
                continue
            result = {**asdict(row), "variant": row.variant, **measure(study.of(row), row)}
        except Exception as error:  # noqa: BLE001 - one failed row must not end the study
            say("failed", row=row.name, error=f"{type(error).__name__}: {error}")
            continue
        write(study.result(row), result)
        time_facts = {"model": row.model, "length": row.length, "row_seconds": result["row_seconds"]}
        write(study.out / "times" / study.result(row).name, time_facts)
        shown = ("row_seconds", "reconstruct_seconds", "one_step", "held_out", "final", "top1")
        say("finished", row=row.name, **{name: result[name] for name in shown if name in result})


def start(options: argparse.Namespace, until: float) -> None:
    """Starts the workers, several per GPU, and waits for them."""
    gpus = options.gpus.split(",")
    if options.mps != "auto":
        run_workers(options, gpus, options.mps, until)
        return
    with mps_daemons(gpus) as pipes:
        run_workers(options, gpus, pipes, until)


def run_workers(options: argparse.Namespace, gpus: list[str], pipes: str, until: float) -> None:
    """Runs the workers to their end; `pipes` is the start of the pipe directories of MPS daemons, or empty."""
    for claims in (options.out / "claims", *options.out.glob("*-trajectories/claims")):
        shutil.rmtree(claims, ignore_errors=True)
    processes = []
    threads = max(1, len(os.sched_getaffinity(0)) // options.workers)
    for number in range(options.workers):
        environment, gpu = {**os.environ, "OMP_NUM_THREADS": str(threads)}, gpus[number % len(gpus)]
        arguments = [*sys.argv[1:], "--worker", str(number), "--until", str(until)]
        if gpu != "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = gpu
            if pipes:
                environment |= {"CUDA_VISIBLE_DEVICES": "0", "CUDA_MPS_PIPE_DIRECTORY": f"{pipes}-{gpu}"}
        command = [sys.executable, __file__, *arguments]
        processes.append(subprocess.Popen(command, env=environment))
    for process in processes:
        process.wait()


def read_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the study lies")
    parser.add_argument(
        "--rows",
        type=Path,
        nargs="+",
        help="files of exported rows, which a study does not measure again and --export writes too; their table is"
        " printed without --out",
    )
    parser.add_argument("--bits", default="", help="with --rows, bit widths that the table shows beside full precision")
    parser.add_argument("--labels", default="", help="with --rows, recipes that it shows, separated by semicolons")
    parser.add_argument(
        "--export", type=Path, help="write the finished rows of --images pictures with their metrics alone; run nothing"
    )
    parser.add_argument(
        "--models",
        default=",".join(MODELS),
        help=f"the shipped models, and {SMALL_MODEL}; with --rows and without --out, those that the tables show",
    )
    parser.add_argument(
        f"--{SMALL_MODEL}",
        type=Path,
        metavar="FOLDER",
        help=f"what the stage {SMALL_MODEL} of the training wrote; that model does not ship",
    )
    parser.add_argument("--seeds", default="0,1,2", help="seeds of the rows that are measured, or shown alike")
    parser.add_argument("--only", default="", help="regular expression that the names of rows match")
    parser.add_argument("--images", type=int, default=1000, help="pictures per row")
    parser.add_argument("--keep", action="store_true", help="leave the quantized models of finished rows in OUT/runs")
    parser.add_argument("--held-out", type=int, default=128, help="trajectories for the errors of single steps")
    parser.add_argument("--batch", type=int, default=250, help="pictures generated together")
    parser.add_argument("--trajectories", type=int, help="trajectories per collection; by default the model's number")
    parser.add_argument("--iterations", type=int, help="at most so many optimizer steps per unit: for a trial")
    parser.add_argument("--gpus", default="0", help="numbers of GPUs, or cpu")
    parser.add_argument("--workers", type=int, default=1, help="rows at a time, over all GPUs")
    parser.add_argument(
        "--unlearned-workers", type=int, default=0, help="how many of them begin with rows that learn nothing"
    )
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="time limit; rows that would exceed it are not begun"
    )
    parser.add_argument(
        "--expected", type=float, default=150, help="seconds of a row with 300 iterations, until one is measured"
    )
    parser.add_argument(
        "--mps",
        default="",
        help="auto: share each GPU through an MPS daemon, where its program is installed; or PIPE, where the pipe"
        " directory of a running daemon is PIPE-0 for GPU 0",
    )
    parser.add_argument("--table", action="store_true", help="print the tables of what is finished, run nothing")
    parser.add_argument(
        "--steps", action="store_true", help="with --rows, print the samples and the error of each step"
    )
    parser.add_argument("--summary", help="with --rows, print what the bit widths of this recipe cost, in one table")
    parser.add_argument("--picture", type=Path, help="save a comparison of the first model here, run nothing")
    parser.add_argument("--pictured", default="default-w4a8,default-w4a4", help="rows that the comparison shows")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out is None and options.rows is None:
        parser.error("--out is needed to run a study")
    if options.out is not None and SMALL_MODEL in options.models.split(",") and options.ddpm_emoji is None:
        parser.error(f"--models {SMALL_MODEL} needs --{SMALL_MODEL} FOLDER")
    return options


def print_tables(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Prints what the command line asks for of exported rows."""
    shown: dict[str, list[str]] = {"model": listed(options.models), "seed": options.seeds.split(",")}
    rows = [row for row in rows if all(str(row[key]) in names for key, names in shown.items())]
    if options.steps or options.summary:
        print(steps_table(rows) if options.steps else summary_table(rows, options.summary))
        return
    shown = {"bits": options.bits.split(","), "label": options.labels.split(";")}
    chosen = [(key, names) for key, names in shown.items() if names != [""]]
    print(table([row for row in rows if not row["bits"] or all(row[key] in names for key, names in chosen)]))


def main() -> None:
    """Runs the study, or prints or writes what was measured."""
    options = read_options()
    earlier = [json.loads(line) for file in options.rows or () for line in file.read_text().splitlines()]
    if options.out is None:
        print_tables(earlier, options)
        return
    if options.export is not None:
        export(
            [*earlier, *(row for row in read_results(options.out) if row["images"] == options.images)], options.export
        )
        return
    device = "cpu" if options.gpus == "cpu" else "cuda:0"
    sizes = (options.images, options.held_out, options.batch, options.trajectories, options.iterations)
    small = None if options.ddpm_emoji is None else options.ddpm_emoji.resolve()
    study = Study(options.out, *sizes, options.expected, device, small, options.keep)
    if options.worker is not None:
        rows = rows_in_order(options.models.split(","), [int(seed) for seed in options.seeds.split(",")])
        measured = {tuple(row[key] for key in KEYS) for row in earlier if row["images"] == options.images}
        rows = [row for row in rows if re.search(options.only, row.name) and row.key not in measured]
        work(study, rows, options.until, options.worker >= options.unlearned_workers)
        return
    if options.picture is not None:
        from study.emoji_judge import save_comparison

        save_comparison(options.out, options.models.split(",")[0], options.pictured.split(","), options.picture)
        return
    if not options.table:
        start(options, time.time() + options.seconds)
    print(table(read_results(options.out)))


if __name__ == "__main__":
    main()
