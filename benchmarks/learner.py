"""Measure the learner: variants of a recipe on held-out trajectories, several seeds, as many processes as fit the GPUs.

    python benchmarks/learner.py --out studies/learner --workers 24
    python benchmarks/learner.py --out studies/learner --table

One command collects trajectories once per model and seed, reconstructs every variant, and judges it on trajectories
that it has not learned from. Each job leaves one JSON file below OUT/results; the same command skips what is there, so
that a killed study goes on. Nothing is downloaded.

A variant is a shipped recipe with some fields changed, such as `default+learn.rounding_sharpness=1`; `samples=16` is
the size of the calibration set. What is measured of each:

- `hard`, `soft`, `first`: losses of the units on the calibration set, summed: as deployed, before h is rounded to 0 or
  1, and with weights rounded to nearest; `undecided`: the share of weights with 0.05 < h < 0.95 when learning ended;
- `held_out`: the deployed loss on other trajectories, all steps alike, in the same units; against `hard` it shows how
  far the units overfit;
- `one_step`: relative L2 error of the prediction at the steps of full-precision trajectories; `guided` the same of the
  combination of both branches, where the model has guidance; `bias`: the share of the error's energy that is the mean
  error of each step and channel;
- `final`: relative L2 distance of final samples to those of full precision from the same noise, mean over images.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edadm_cli.artifacts import RunFolder
    from edadm_cli.models.loading import LoadedModel
    from edadm_cli.recipe import Recipe

BEFORE = "default+learn.rounding_sharpness=1+select.density_quantile=0.5"
LADDER = {
    "before": BEFORE,
    "default": "default",
}
ITERATIONS = {
    f"{count} iterations, tau {tau}": f"default+learn.iterations={count}+learn.rounding_sharpness={tau}"
    for count, tau in ((100, 20), (100, 50), (300, 50), (600, 20))
}
SAMPLES = {
    f"N {samples}, gamma {gamma}": f"default+samples={samples}+learn.layer_loss_weight={gamma}"
    for samples in (16, 64)
    for gamma in (0, 0.2)
}
FIELDS = {
    "gamma 0": "default+learn.layer_loss_weight=0",
    "gamma 0.8, absolute": "default+learn.layer_loss_weight=0.8+learn.relative_layer_losses=false",
    "median radius": "default+select.density_quantile=0.5",
    "uniform steps": "default+select.strategy=uniform",
    "input drop 0.5": "default+learn.input_drop=0.5",
    "regularizer 0": "default+learn.rounding_regularizer=0",
    "regularizer 0.01": "default+learn.rounding_regularizer=0.01",
}
CHANNEL_SCALES = 'transforms=[{"name":"input-channel-scale"}]'
INGREDIENTS = {
    "weight scales by output error": "default+ranges.weight=output-error",
    "bias correction": "default+learn.bias_correction=true",
    "channel scales": f"default+{CHANNEL_SCALES}",
    "channel scales, exponent 1": 'default+transforms=[{"name":"input-channel-scale","options":{"exponent":1}}]',
    "all three": f"default+ranges.weight=output-error+learn.bias_correction=true+{CHANNEL_SCALES}",
}
GROUPS = {"ladder": LADDER, "ingredients": INGREDIENTS, "iterations": ITERATIONS, "samples": SAMPLES, "fields": FIELDS}
WIDTHS = {"ladder": ("w4a8", "w3a8", "w4a4"), "ingredients": ("w4a8", "w4a4")}
METRICS = ("undecided", "first", "soft", "hard", "held_out", "one_step", "guided", "bias", "final", "seconds")


@dataclass(frozen=True)
class Job:
    """One variant at one bit width with one seed; without a variant, the trajectories that a seed's jobs share."""

    model: str
    seed: int
    label: str = ""
    variant: str = ""
    bits: str = ""

    def file(self, out: Path) -> Path:
        """Returns where the result lies."""
        name = re.sub(r"[^a-z0-9.]+", "-", self.label.lower())
        return out / "results" / self.model / f"seed{self.seed}" / f"{name}-{self.bits}.json"


@dataclass(frozen=True)
class Settings:
    """What all jobs share."""

    out: Path
    trajectories: int | None
    images: int
    iterations: int | None
    threads: int


def variant_recipe(variant: str, iterations: int | None) -> tuple[Recipe, int | None]:
    """Returns the recipe of a variant and the size of its calibration set; `iterations` replaces the recipe's own."""
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
    if iterations is not None and fields["learn"]["iterations"]:
        fields["learn"]["iterations"] = min(iterations, fields["learn"]["iterations"])
    return Recipe.model_validate(fields), samples


def shared_folder(settings: Settings, job: Job) -> RunFolder:
    """Returns the run with the trajectories that all jobs of a seed use."""
    from edadm_cli.artifacts import RunFolder

    return RunFolder(settings.out / "runs" / job.model / f"seed{job.seed}" / "shared")


def collect(settings: Settings, job: Job, device: str) -> None:
    """Samples the full-precision trajectories of a seed."""
    from edadm_cli.collect.stage import run
    from edadm_cli.config import CollectConfig

    config = CollectConfig(model=job.model, seed=job.seed, device=device, num_trajectories=settings.trajectories)
    run(config, shared_folder(settings, job))


def link_collection(source: RunFolder, target: RunFolder) -> None:
    """Makes the trajectories appear in another run; its files are hard links."""
    place = target.path("collect")
    if not place.exists():
        shutil.rmtree(target.root, ignore_errors=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source.path("collect"), place, copy_function=os.link)


def measure(settings: Settings, job: Job, device: str) -> dict[str, Any]:
    """Selects, reconstructs and judges one variant."""
    from edadm_cli.artifacts import RunFolder
    from edadm_cli.config import BitWidth, ReconstructConfig, SelectConfig
    from edadm_cli.reconstruct.stage import run as reconstruct
    from edadm_cli.select.stage import run as select

    recipe, samples = variant_recipe(job.variant, settings.iterations)
    folder = RunFolder(settings.out / "runs" / job.model / f"seed{job.seed}" / job.file(settings.out).stem)
    link_collection(shared_folder(settings, job), folder)
    shared = {"seed": job.seed, "device": device}
    chosen = {name: value for name, value in recipe.select.model_dump().items() if value is not None}
    if samples is not None and settings.trajectories is not None:
        samples = min(samples, settings.trajectories)
    selected = select(SelectConfig(num_samples=samples, **chosen, **shared), folder)
    bits = BitWidth.parse(job.bits)
    learned = reconstruct(ReconstructConfig(bits=bits, recipe=recipe, batch_size=128, **shared), folder)
    result = {
        "counts": list(selected.counts),
        "seconds": learned.seconds,
        "first": learned.loss.first,
        "soft": learned.loss.soft,
        "hard": learned.loss.last,
        "undecided": learned.loss.undecided,
        "warnings": list(learned.warnings),
        **judge(settings, job, folder, device),
    }
    shutil.rmtree(folder.root)
    return result


def judge(settings: Settings, job: Job, folder: RunFolder, device: str) -> dict[str, Any]:
    """Compares a quantized denoiser with full precision: on the steps of other trajectories, and at their ends."""
    import torch

    from edadm_cli.artifacts import Units
    from edadm_cli.artifacts.quantization import load_plan
    from edadm_cli.models.collected import CollectedRun, load_collected_model
    from edadm_cli.models.sampling import EVALUATION, image_seed, sample
    from edadm_cli.quant.network import load_quant_params, quantize_network

    artifact, sampling = folder.open("reconstruct", job.bits), CollectedRun.open(folder)
    exact, quantized = (load_collected_model(folder, torch.device(device), torch.float32) for _ in range(2))
    quantize_network(quantized.denoiser, load_plan(artifact))
    load_quant_params(quantized.denoiser, artifact.tensors("quant_params.safetensors"))
    prompts = sampling.prompts
    guidance = sampling.guidance_scale
    call = {
        "seeds": [image_seed(job.seed, index, EVALUATION) for index in range(settings.images)],
        "prompts": None if prompts is None else [prompts[index % len(prompts)] for index in range(settings.images)],
        "num_steps": sampling.num_steps,
        "guidance_scale": guidance,
    }
    units = Units.load(artifact).units
    with one_step_errors(exact, quantized.denoiser, [unit.name for unit in units], guidance) as errors:
        reference = sample(exact, **call)
    final = sample(quantized, **call).latents
    distance = (final - reference.latents).flatten(1).norm(dim=1) / reference.latents.flatten(1).norm(dim=1)
    return {**errors.summary(), "final": float(distance.mean()), "final_bias": _bias(final - reference.latents)}


class Errors:
    """Squared errors of the prediction and of every unit, summed over calls."""

    def __init__(self, guidance: float | None) -> None:
        self.guidance = guidance
        self.steps: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self.units: dict[str, list[float]] = defaultdict(list)
        self.bias: list[float] = []

    def add(self, exact: Tensor, quantized: Tensor) -> None:
        """Takes the predictions `[rows, ...]` of one call."""
        self._add("one_step", exact, quantized)
        if self.guidance is not None:
            self._add("guided", self._combine(exact), self._combine(quantized))
        self.bias.append(_bias(quantized - exact))

    def summary(self) -> dict[str, Any]:
        """Returns relative L2 errors over all steps, those of each step, and the summed unit losses."""
        found: dict[str, Any] = {
            name: (sum(error for error, _ in steps) / sum(size for _, size in steps)) ** 0.5
            for name, steps in self.steps.items()
        }
        found |= {f"{name}_by_step": [(e / s) ** 0.5 for e, s in steps] for name, steps in self.steps.items()}
        losses = {name: statistics.mean(values) for name, values in self.units.items()}
        return {**found, "bias": statistics.mean(self.bias), "held_out": sum(losses.values()), "by_unit": losses}

    def _combine(self, prediction: Tensor) -> Tensor:
        unconditional, conditional = prediction.chunk(2)
        assert self.guidance is not None
        return unconditional + self.guidance * (conditional - unconditional)

    def _add(self, name: str, exact: Tensor, quantized: Tensor) -> None:
        pair = (quantized.double() - exact.double()).square().sum(), exact.double().square().sum()
        self.steps[name].append((float(pair[0]), float(pair[1])))


@contextmanager
def one_step_errors(
    model: LoadedModel, quantized: nn.Module, units: Sequence[str], guidance: float | None
) -> Iterator[Errors]:
    """Runs the quantized denoiser on every call of the full-precision one while entered."""
    from edadm_cli.reconstruct.unit_data import channel_loss

    errors, outputs = Errors(guidance), [{}, {}]  # type: ignore[var-annotated]

    def keep(side: int, name: str) -> Any:
        return lambda _, __, output: outputs[side].update({name: output[0] if isinstance(output, tuple) else output})

    def compare(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        other = quantized(*args, **kwargs)
        errors.add(_prediction(output), _prediction(other))
        for name in units:
            errors.units[name].append(float(channel_loss(outputs[1][name], outputs[0][name])))

    with ExitStack() as stack:
        for side, denoiser in enumerate((model.denoiser, quantized)):
            for name in units:
                handle = denoiser.get_submodule(name).register_forward_hook(keep(side, name))
                stack.callback(handle.remove)
        stack.callback(model.denoiser.register_forward_hook(compare, with_kwargs=True).remove)
        yield errors


def _prediction(output: Any) -> Tensor:
    prediction: Tensor = output[0] if isinstance(output, tuple) else output.sample
    return prediction


def _bias(error: Tensor) -> float:
    """Returns the share of the energy of an error `[rows, channels, ...]` that is the mean of each channel."""
    means = error.transpose(0, 1).flatten(1).double().mean(dim=1)
    return float(means.square().mean() / error.double().square().mean())


def begin(devices: Any, threads: int) -> None:
    """Gives a process of the pool its device; of several GPUs it sees its own alone."""
    device = devices.get()
    if device != "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"], device = device, "cuda:0"
    os.environ["EDADM_STUDY_DEVICE"] = device
    import torch

    torch.set_num_threads(threads)


def work(task: tuple[Settings, Job]) -> dict[str, Any]:
    """Runs one job; a failure is printed, and its job is run again by the next command."""
    settings, job = task
    device, started = os.environ["EDADM_STUDY_DEVICE"], time.monotonic()
    try:
        if not job.variant:
            collect(settings, job, device)
            return asdict(job)
        result = {**asdict(job), **measure(settings, job, device)}
    except Exception as error:  # noqa: BLE001 - one failed job must not end the study
        return {**asdict(job), "error": f"{type(error).__name__}: {error}"}
    result["job_seconds"] = round(time.monotonic() - started, 1)
    path = job.file(settings.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(result), encoding="utf-8")
    aside.replace(path)
    return {name: result[name] for name in ("model", "seed", "label", "bits", "hard", "one_step", "final")}


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """Returns all jobs; those of a seed follow each other, and the groups come in the order given."""
    jobs = []
    for group in options.groups.split(","):
        for seed in map(int, options.seeds.split(",")):
            for model in options.models.split(","):
                for label, variant in GROUPS[group].items():
                    widths = options.bits.split(",") if options.bits else WIDTHS.get(group, ("w4a8",))
                    jobs += [Job(model, seed, label, variant, bits) for bits in widths]
    return jobs


def run_study(options: argparse.Namespace, settings: Settings) -> None:
    """Collects each seed, then runs what is not finished."""
    jobs = [job for job in jobs_of(options) if not job.file(settings.out).is_file()]
    collections = sorted({(job.model, job.seed) for job in jobs})
    context = multiprocessing.get_context("spawn")
    devices, names = context.Queue(), _devices(options.devices)
    for index in range(options.workers):
        devices.put(names[index % len(names)])
    with context.Pool(options.workers, begin, (devices, options.threads)) as pool:
        for group in ([Job(*shared) for shared in collections], jobs):
            for result in pool.imap_unordered(work, [(settings, job) for job in group]):
                print(json.dumps(result), file=sys.stderr, flush=True)
        pool.close()
        pool.join()


def _devices(text: str) -> list[str]:
    """Names of the GPUs as CUDA_VISIBLE_DEVICES takes them, or `cpu`."""
    import torch

    if text != "auto":
        return text.split(",")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    return visible.split(",") if torch.cuda.is_available() else ["cpu"]


def table(out: Path) -> str:
    """Returns means over the seeds and sample standard deviations as Markdown, one table per model and bit width."""
    rows: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted((out / "results").rglob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        rows[result["model"], result["bits"]][result["label"]].append(result)
    labels = [label for group in GROUPS.values() for label in group]
    lines: list[str] = []
    for (model, bits), variants in sorted(rows.items()):
        lines += ["", f"### {model} {bits}", "", "| variant | seeds | " + " | ".join(METRICS) + " |"]
        lines.append("|---|---|" + "---|" * len(METRICS))
        for label in sorted(variants, key=lambda label: labels.index(label) if label in labels else len(labels)):
            cells = [_cell([r[name] for r in variants[label] if r.get(name) is not None]) for name in METRICS]
            lines.append(f"| {label} | {len(variants[label])} | " + " | ".join(cells) + " |")
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
    parser.add_argument("--models", default="digits-ddpm,digits-sd")
    parser.add_argument("--groups", default=",".join(GROUPS))
    parser.add_argument("--bits", default="", help="bit widths of all groups; else each group's own")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--trajectories", type=int, help="of a collection; else the model's own number")
    parser.add_argument("--images", type=int, default=128, help="held-out trajectories")
    parser.add_argument("--iterations", type=int, help="at most so many optimizer steps per unit: for a trial")
    parser.add_argument(
        "--devices", default="auto", help="cpu, or numbers of GPUs such as 0,1; auto takes all that are visible"
    )
    parser.add_argument("--workers", type=int, default=1, help="jobs at a time, over all devices")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per job")
    parser.add_argument("--table", action="store_true", help="print the tables of what is finished, run nothing")
    options = parser.parse_args()
    settings = Settings(options.out, options.trajectories, options.images, options.iterations, options.threads)
    if not options.table:
        run_study(options, settings)
    print(table(options.out))


if __name__ == "__main__":
    main()
