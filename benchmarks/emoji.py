"""Study quantization on the emoji models: recipes, bit widths and seeds, with every metric of quality.

    python benchmarks/emoji.py --out studies/emoji --gpus 0,1 --workers 12
    python benchmarks/emoji.py --out studies/emoji --table

A row is one variant of a recipe (`benchmarks/learner.py` says how a variant is written) on one model, at one bit width,
with one seed. Each row leaves one JSON file below OUT/results; the same command skips what is there, so that a study
that was killed goes on. `--seconds` ends it: no row that learns is begun when the time that is left is shorter than
the longest one so far. Rows come in the order of their importance. Nothing is downloaded.

Metrics of a row, over `--images` pictures of one seed each, which no calibration has seen:

- `one_step`, `guided`: relative L2 error of single predictions on held-out full-precision trajectories (`--held-out`
  of them), of both branches and of the guided combination; `held_out`: loss of the units on them;
- `final`: relative L2 distance of the final latent to full precision of the same seed, mean over the pictures;
- `ssim`, `perceptual`, `perceptual_imagenet`: of the pictures to full precision of the same seed, in the features of
  the emoji encoder and of EfficientNet-Lite0;
- `frechet`, `frechet_spatial`: to the training pictures, in the features of the emoji encoder; `frechet_imagenet`,
  `kernel_imagenet`: to the 967 pictures with held-out names, in those of EfficientNet-Lite0;
- `top1`, `top5`: share of the pictures whose name ranks first, or among the first five, of 500.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learner import link_collection, variant_recipe
from learner_variants import BEFORE

if TYPE_CHECKING:
    from torch import Tensor

    from edadm_cli.artifacts import RunFolder
    from edadm_cli.metrics.representation import Features
    from edadm_cli.models.collected import CollectedRun
    from edadm_cli.models.loading import LoadedModel

VARIANTS = {
    "default": "default",
    "before": BEFORE,
    "paper, 300 iterations": "paper+learn.iterations=300",
    "q-diffusion, 300 iterations": "q-diffusion+learn.iterations=300+learn.weight_learning_rate=0.1"
    "+learn.activation_learning_rate=0.001",
    "ptq4dm": "ptq4dm",
    "rtn": "rtn",
    "ranges-only": "default+learn.granularity=none",
    "no TDAC": "default+select.strategy=uniform",
    "no layer losses": "default+learn.layer_loss_weight=0",
    "neither": "default+select.strategy=uniform+learn.layer_loss_weight=0",
    "radius median": "default+select.density_quantile=0.5",
    "layer losses 0.8, absolute": "default+learn.layer_loss_weight=0.8+learn.relative_layer_losses=false",
    "output-error scales": "default+ranges.weight=output-error",
}
MODELS = ("emoji-sd", "emoji-dit")
METRICS = {
    "one_step": "one step",
    "guided": "guided",
    "held_out": "held-out loss",
    "final": "relative L2",
    "ssim": "SSIM",
    "perceptual": "perceptual, emoji",
    "perceptual_imagenet": "perceptual, ImageNet",
    "frechet": "Fréchet, emoji",
    "frechet_spatial": "Fréchet, emoji spatial",
    "frechet_imagenet": "Fréchet, ImageNet",
    "kernel_imagenet": "kernel, ImageNet",
    "top1": "top 1",
    "top5": "top 5",
}
EXACT = "full-precision.safetensors"
SHOWN = 48  # pictures of a row that are saved


@dataclass(frozen=True)
class Row:
    """One variant on one model at one bit width with one seed."""

    model: str
    seed: int
    label: str
    bits: str

    @property
    def variant(self) -> str:
        """The recipe and its changed fields."""
        return VARIANTS[self.label]

    @property
    def learns(self) -> bool:
        """Whether anything is learned, which takes most of a row's time."""
        learn = variant_recipe(self.variant, None)[0].learn
        return learn.granularity != "none" and learn.iterations != 0

    @property
    def name(self) -> str:
        """Name of the row in file names."""
        return re.sub(r"[^a-z0-9.]+", "-", f"{self.model} {self.label} {self.bits} {self.seed}".lower())


def rows_in_order(models: list[str], seeds: list[int]) -> list[Row]:
    """Returns all rows, those that matter most first."""
    published = ("paper, 300 iterations", "q-diffusion, 300 iterations")
    unlearned = ("rtn", "ptq4dm", "ranges-only")
    claims = ("neither", "no layer losses", "no TDAC", "before")
    fields = [label for label in VARIANTS if label not in (*published, *unlearned, *claims)]
    plan: list[tuple[Sequence[str], Sequence[str], list[int]]] = [
        (("default", *unlearned), ("w4a8",), seeds[:1]),
        (("default", "rtn", "ptq4dm"), ("w4a4",), seeds[:1]),
        (published[:1], ("w4a8",), seeds[:1]),
        (("default", "rtn", "ptq4dm"), ("w4a8",), seeds[:2]),
        (claims, ("w4a8",), seeds[:1]),
        (("default", "rtn", "ptq4dm"), ("w4a8",), seeds),
        (("default", "rtn", "ptq4dm"), ("w8a8", "w3a8", "w6a6"), seeds[:1]),
        (published, ("w4a8",), seeds[:1]),
        (claims, ("w4a8",), seeds),
        (("default", *unlearned), ("w4a4",), seeds),
        (fields, ("w4a8",), seeds[:1]),
        (("default", *published, *unlearned), ("w4a8", "w8a8", "w4a4", "w3a8", "w6a6"), seeds),
        (fields, ("w4a8",), seeds),
    ]
    rows: dict[Row, None] = {}
    for labels, widths, few in plan:
        for bits in widths:
            for seed in few:
                for label in labels:
                    rows |= {Row(model, seed, label, bits): None for model in models}
    return list(rows)


@dataclass(frozen=True)
class Study:
    """Where the study lies, and its sizes."""

    out: Path
    images: int
    held_out: int
    batch: int
    trajectories: int | None
    iterations: int | None
    expected: float
    device: str

    def shared(self, model: str, seed: int) -> Path:
        """Returns the folder of what all rows of a model and a seed use."""
        return self.out / "runs" / f"{model}-{seed}"

    def result(self, row: Row) -> Path:
        """Returns the file of a finished row."""
        return self.out / "results" / f"{row.name}.json"


# Full precision


def collect_trajectories(study: Study, model: str, seed: int) -> dict[str, Any]:
    """Collects the trajectories of a seed, of which all its rows learn."""
    from edadm_cli.artifacts import RunFolder
    from edadm_cli.collect.stage import run
    from edadm_cli.config import CollectConfig

    config = CollectConfig(model=model, seed=seed, device=study.device, num_trajectories=study.trajectories)
    run(config, RunFolder(study.shared(model, seed)))
    return {"model": model, "seed": seed}


def generate_exact(study: Study, model: str, seed: int) -> dict[str, Any]:
    """Generates the full-precision pictures of a seed, and judges them."""
    from edadm_cli.artifacts import RunFolder

    started, folder = time.monotonic(), RunFolder(study.shared(model, seed))
    exact, collected = load(study, folder)
    pictures, latents = generate(study, exact, collected, seed)
    judged = judge(study.device)
    features = judged.features(pictures)
    save_exact(folder, pictures, latents, features)
    save_sheet(pictures, study.out / "pictures" / f"{model}-full-precision-{seed}.webp")
    facts = {"model": model, "seed": seed, "label": "full precision", "bits": "", "images": study.images}
    facts["row_seconds"] = round(time.monotonic() - started, 1)
    return {**facts, **judged.metrics(features, labels(prompts_of(collected, study.images, seed)))}


def save_exact(folder: RunFolder, pictures: Tensor, latents: Tensor, features: dict[str, Features]) -> None:
    """Saves what rows compare themselves with."""
    from safetensors.torch import save_file

    tensors = {"pictures": pictures, "latents": latents}
    for space, values in features.items():
        tensors |= {f"{space}.{layer}": values.layer(layer) for layer in ("pooled", "spatial", "logits")}
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder.root / EXACT)


def load_exact(folder: RunFolder) -> tuple[Tensor, Tensor, dict[str, Features]]:
    """Returns the pictures, final latents and features of full precision."""
    from safetensors.torch import load_file

    from edadm_cli.metrics.representation import LAYERS, Features

    tensors = load_file(folder.root / EXACT)
    spaces = ("emoji", "imagenet")
    features = {space: Features(**{layer: tensors[f"{space}.{layer}"] for layer in LAYERS}) for space in spaces}
    return tensors["pictures"], tensors["latents"], features


def load(study: Study, folder: RunFolder) -> tuple[LoadedModel, CollectedRun]:
    """Loads the full-precision pipeline of a run."""
    import torch

    from edadm_cli.models.collected import CollectedRun, load_collected_model

    return load_collected_model(folder, torch.device(study.device), torch.float32), CollectedRun.open(folder)


def prompts_of(collected: CollectedRun, count: int, seed: int) -> list[str]:
    """Returns the prompts that `edadm evaluate` would use."""
    from edadm_cli.models.shipped import shipped_prompts

    assert collected.entry.prompts is not None
    return shipped_prompts(collected.entry.prompts, count, seed)


def labels(prompts: list[str]) -> Tensor:
    """Returns the number of the name that each prompt asks for, -1 for none."""
    import torch

    from edadm_cli.models.emoji.data import label_of_prompt

    numbers = [label_of_prompt(prompt) for prompt in prompts]
    return torch.tensor([-1 if number is None else number for number in numbers])


def generate(study: Study, model: LoadedModel, collected: CollectedRun, seed: int) -> tuple[Tensor, Tensor]:
    """Returns the pictures (uint8) and final latents of the seeds that an evaluation uses."""
    import torch

    from edadm_cli.models.sampling import EVALUATION, image_seed, sample

    prompts, parts = prompts_of(collected, study.images, seed), []
    for start in range(0, study.images, study.batch):
        numbers = range(start, min(start + study.batch, study.images))
        parts.append(
            sample(
                model,
                seeds=[image_seed(seed, number, EVALUATION) for number in numbers],
                prompts=[prompts[number] for number in numbers],
                num_steps=collected.num_steps,
                guidance_scale=collected.guidance_scale,
            )
        )
    return torch.cat([part.images for part in parts]), torch.cat([part.latents for part in parts])


def save_sheet(pictures: Tensor, path: Path) -> None:
    """Saves the first pictures side by side, without loss."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    shown = pictures[:SHOWN].permute(0, 2, 3, 1)
    columns = 12
    shown = shown[: len(shown) // columns * columns] if len(shown) >= columns else shown
    rows = [
        [*shown[start : start + columns]] for start in range(0, len(shown), min(columns, len(shown)))
    ]  # [H, W, 3] each
    import torch

    Image.fromarray(torch.cat([torch.cat(row, 1) for row in rows]).numpy()).save(path, lossless=True)


class Judge:
    """Both feature extractors, and the real pictures."""

    def __init__(self, device: str) -> None:
        import torch

        from edadm_cli.evaluate.efficientnet import efficientnet_space
        from edadm_cli.evaluate.emoji_features import emoji_space
        from edadm_cli.evaluate.real_files import ArrayImages
        from edadm_cli.models.emoji.data import real_pictures

        self.device = torch.device(device)
        self.spaces = {"emoji": emoji_space(self.device), "imagenet": efficientnet_space(self.device)}
        self.real = self.spaces["imagenet"].extract(ArrayImages(real_pictures())).pooled

    def features(self, pictures: Tensor) -> dict[str, Features]:
        """Returns the features of pictures in both spaces."""
        from edadm_cli.evaluate.real_files import ArrayImages

        return {name: space.extract(ArrayImages(pictures)) for name, space in self.spaces.items()}

    def metrics(self, features: dict[str, Features], names: Tensor) -> dict[str, float]:
        """Returns the metrics of a set of pictures by itself."""
        from edadm_cli.evaluate.emoji_features import shipped_emoji
        from edadm_cli.metrics.fidelity import feature_statistics, frechet_distance
        from edadm_cli.models.emoji.train.measure import frechet

        real = shipped_emoji().statistics
        emoji = features["emoji"]
        imagenet, imagenet_real = (each.to(self.device) for each in (features["imagenet"].pooled, self.real))
        named = names >= 0
        hits = emoji.logits.cpu()[named].topk(5).indices == names[named, None]
        return {
            "frechet": frechet_distance(feature_statistics(emoji.pooled), real["pooled"]),
            "frechet_spatial": frechet_distance(feature_statistics(emoji.spatial), real["spatial"]),
            "frechet_imagenet": frechet(imagenet, imagenet_real),
            "kernel_imagenet": kernel_distance(imagenet, imagenet_real),
            "top1": float(hits[:, 0].double().mean()),
            "top5": float(hits.any(1).double().mean()),
        }


@cache
def judge(device: str) -> Judge:
    """Returns the judge of a process."""
    return Judge(device)


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """Returns the unbiased squared MMD with the kernel (x . y / D + 1)^3, over all rows at once."""
    size = first.shape[1]

    def kernel(one: Tensor, two: Tensor) -> Tensor:
        return (one.double() @ two.double().T / size + 1) ** 3

    def within(rows: Tensor) -> Tensor:
        values = kernel(rows, rows)
        return (values.sum() - values.trace()) / (len(rows) * (len(rows) - 1))

    return float(within(first) + within(second) - 2 * kernel(first, second).mean())


# One row


def measure(study: Study, row: Row) -> dict[str, Any]:
    """Selects, reconstructs and judges one row."""
    from edadm_cli.artifacts import RunFolder
    from edadm_cli.artifacts.quantization import load_plan
    from edadm_cli.config import BitWidth, ReconstructConfig, SelectConfig
    from edadm_cli.quant.network import load_quant_params, quantize_network
    from edadm_cli.reconstruct.stage import run as reconstruct
    from edadm_cli.select.stage import run as select

    started = time.monotonic()
    recipe, samples = variant_recipe(row.variant, study.iterations)
    source, folder = RunFolder(study.shared(row.model, row.seed)), RunFolder(study.out / "runs" / row.name)
    link_collection(source, folder)
    shared = {"seed": row.seed, "device": study.device}
    chosen = {name: value for name, value in recipe.select.model_dump().items() if value is not None}
    selected = select(SelectConfig(num_samples=min(samples, study.trajectories or samples), **chosen, **shared), folder)
    bits = BitWidth.parse(row.bits)
    arithmetic = {} if study.device == "cpu" else {"matmul": "float32"}  # as the first rows were measured
    config = ReconstructConfig(bits=bits, recipe=recipe, batch_size=128, memory_budget_mib=4096, **arithmetic, **shared)
    learned = reconstruct(config, folder)
    learned_at = time.monotonic()
    say("learned", row=row.name, seconds=learned_at - started)
    ready(study, row.model, row.seed, "pictures", generate_exact)
    artifact = folder.open("reconstruct", row.bits)
    exact, collected = load(study, folder)
    quantized, _ = load(study, folder)
    quantize_network(quantized.denoiser, load_plan(artifact))
    load_quant_params(quantized.denoiser, artifact.tensors("quant_params.safetensors"))
    errors = step_errors(study, row, exact, quantized, collected, artifact)
    pictures, latents = generate(study, quantized, collected, row.seed)
    judged = judge(study.device)
    features = judged.features(pictures)
    if row.seed == 0:
        save_sheet(pictures, study.out / "pictures" / f"{row.name}.webp")
    shutil.rmtree(folder.root)
    return {
        "recipe": recipe.model_dump(mode="json"),
        "counts": list(selected.counts),
        "loss": learned.loss.model_dump(),
        "reconstruct_seconds": learned.seconds,
        "judge_seconds": round(time.monotonic() - learned_at, 1),
        "row_seconds": round(time.monotonic() - started, 1),
        **errors,
        **paired(pictures, latents, features, load_exact(source), study.device),
        **judged.metrics(features, labels(prompts_of(collected, study.images, row.seed))),
    }


def paired(
    pictures: Tensor, latents: Tensor, features: dict[str, Features], reference: Any, device: str
) -> dict[str, float]:
    """Returns the distances to full precision of the same seeds."""
    from edadm_cli.metrics.distances import perceptual_distance, relative_l2, ssim

    exact, exact_latents, exact_features = reference
    return {
        "final": float(relative_l2(latents, exact_latents).mean()),
        "ssim": float(ssim(pictures.to(device), exact.to(device)).mean()),
        "perceptual": float(perceptual_distance(features["emoji"], exact_features["emoji"]).mean()),
        "perceptual_imagenet": float(perceptual_distance(features["imagenet"], exact_features["imagenet"]).mean()),
    }


def step_errors(
    study: Study, row: Row, exact: LoadedModel, quantized: LoadedModel, collected: CollectedRun, artifact: Any
) -> dict[str, Any]:
    """Returns the errors of single steps on full-precision trajectories that were not learned from."""
    from learner_judge import one_step_errors

    from edadm_cli.artifacts import Units
    from edadm_cli.models.sampling import EVALUATION, image_seed, sample

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


def work(study: Study, rows: list[Row], until: float, prefers_learning: bool) -> None:
    """Takes one row after the other until none is left or the time is over."""
    while True:
        longest = [json.loads(path.read_text())["row_seconds"] for path in (study.out / "times").glob("*.json")]
        left = until - time.time()
        may_learn = left > 1.1 * max(longest, default=study.expected)
        open_rows = [row for row in rows if not study.result(row).is_file() and (may_learn or not row.learns)]
        open_rows.sort(key=lambda row: row.learns != prefers_learning)
        row = next((row for row in open_rows if claim(study, row.name)), None)
        if row is None or left < 0:
            return
        try:
            ready(study, row.model, row.seed, "trajectories", collect_trajectories)
            say("begun", row=row.name)
            result = {**asdict(row), "images": study.images, "variant": row.variant, **measure(study, row)}
        except Exception as error:  # noqa: BLE001 - one failed row must not end the study
            say("failed", row=row.name, error=f"{type(error).__name__}: {error}")
            continue
        write(study.result(row), result)
        if row.learns:
            write(study.out / "times" / f"{row.name}.json", {"row_seconds": result["row_seconds"]})
        shown = ("row_seconds", "reconstruct_seconds", "one_step", "final", "frechet", "top1")
        say("finished", row=row.name, **{name: result[name] for name in shown})


def ready(study: Study, model: str, seed: int, kind: str, make: Callable[[Study, str, int], dict[str, Any]]) -> None:
    """Waits for something that all rows of a model and seed share, or makes it."""
    path = study.shared(model, seed) / f"{kind}.json"
    if not path.is_file() and claim(study, f"{model}-{seed}-{kind}"):
        result = make(study, model, seed)
        if "label" in result:
            write(study.out / "results" / f"{model}-full-precision-{seed}.json", result)
        write(path, result)
        say(kind, **result)
    while not path.is_file():
        time.sleep(0.5)


def say(event: str, **facts: Any) -> None:
    """Prints a line of the log."""
    short = {name: round(value, 5) if isinstance(value, float) else value for name, value in facts.items()}
    print(json.dumps({"time": time.strftime("%H:%M:%S"), "event": event, **short}), flush=True)


def start(options: argparse.Namespace, until: float) -> None:
    """Starts the workers, several per GPU, and waits for them."""
    shutil.rmtree(options.out / "claims", ignore_errors=True)
    gpus = options.gpus.split(",")
    processes = []
    for number in range(options.workers):
        environment, gpu = dict(os.environ), gpus[number % len(gpus)]
        arguments = [*sys.argv[1:], "--worker", str(number), "--until", str(until)]
        if gpu != "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = gpu
            if options.mps:
                environment |= {"CUDA_VISIBLE_DEVICES": "0", "CUDA_MPS_PIPE_DIRECTORY": f"{options.mps}-{gpu}"}
        command = [sys.executable, __file__, *arguments]
        processes.append(subprocess.Popen(command, env=environment))
    for process in processes:
        process.wait()


def read_results(out: Path) -> list[dict[str, Any]]:
    """Returns the finished rows."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "results").glob("*.json"))]


def table(results: list[dict[str, Any]]) -> str:
    """Returns means over the seeds and sample standard deviations as Markdown, one table per model and bit width."""
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        groups[result["model"], result["bits"]][result["label"]].append(result)
    lines: list[str] = []
    for (model, bits), variants in sorted(groups.items()):
        heads = [head for name, head in METRICS.items() if any(name in r for rows in variants.values() for r in rows)]
        keys = [name for name, head in METRICS.items() if head in heads]
        lines += ["", f"### {model} {bits or 'full precision'}", "", "| variant | seeds | " + " | ".join(heads) + " |"]
        lines.append("|---|---|" + "---|" * len(heads))
        for label in sorted(variants, key=lambda label: list(VARIANTS).index(label) if label in VARIANTS else 99):
            rows = variants[label]
            cells = [_cell([row[key] for row in rows if key in row]) for key in keys]
            lines.append(f"| {label} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{spread}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="", help="regular expression that the names of rows match")
    parser.add_argument("--images", type=int, default=1000, help="pictures per row")
    parser.add_argument("--held-out", type=int, default=128, help="trajectories for the errors of single steps")
    parser.add_argument("--batch", type=int, default=250, help="pictures generated together")
    parser.add_argument("--trajectories", type=int, help="of a collection; else the model's own number")
    parser.add_argument("--iterations", type=int, help="at most so many optimizer steps per unit: for a trial")
    parser.add_argument("--gpus", default="0", help="numbers of GPUs, or cpu")
    parser.add_argument("--workers", type=int, default=1, help="rows at a time, over all GPUs")
    parser.add_argument(
        "--unlearned-workers", type=int, default=0, help="how many of them begin with rows that learn nothing"
    )
    parser.add_argument("--seconds", type=float, default=1e9, help="no row is begun after this time")
    parser.add_argument("--expected", type=float, default=150, help="seconds of the first row that learns")
    parser.add_argument("--mps", default="", help="start of the pipe directory of one MPS daemon per GPU")
    parser.add_argument("--table", action="store_true", help="print the tables of what is finished, run nothing")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = "cpu" if options.gpus == "cpu" else "cuda:0"
    sizes = (options.images, options.held_out, options.batch, options.trajectories, options.iterations)
    study = Study(options.out, *sizes, options.expected, device)
    if options.worker is not None:
        rows = rows_in_order(options.models.split(","), [int(seed) for seed in options.seeds.split(",")])
        rows = [row for row in rows if re.search(options.only, row.name)]
        work(study, rows, options.until, options.worker >= options.unlearned_workers)
        return
    if not options.table:
        start(options, time.time() + options.seconds)
    print(table(read_results(options.out)))


if __name__ == "__main__":
    main()
