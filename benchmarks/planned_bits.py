"""Measures budgets of bits that are planned from three kinds of errors, beside equal bits of the same average.

    python benchmarks/planned_bits.py --out studies/planned --models digits-ddpm,digits-sd --seeds 0-2 --workers 6
    python benchmarks/learner_table.py studies/planned --export docs/data/planned.jsonl

Rows of the recipe `default`, or of another variant, at each of `--bits`:

- `equal bits`: `w4a8` or `w3a8`;
- `planned`: an average of as many bits per weight, or that of `auto:4.5a8`, planned as `--bits auto:` plans it, from
  the geometric mean of the errors of nearest rounding and GPTQ;
- `planned for nearest rounding`: from the errors of weights that are rounded to nearest;
- `planned after learning`: the same errors at two to four bits, times the share of the loss of the layer's unit that
  learning left with equal bits.

Each row leaves one JSON file below OUT/results with the metrics of `benchmarks/learner.py`; the same command skips what
is there. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learner import begin, card, device_names, link_collection, seeds_of, variant_recipe
from learner_table import read_rows, table

if TYPE_CHECKING:
    from edadm_cli.artifacts import LayerSensitivity, RunFolder
    from edadm_cli.recipe import Recipe

EQUAL, PLANNED = "equal bits", "planned"
NEAREST, LEARNED = "planned for nearest rounding", "planned after learning"
LEARNED_BITS = 4  # learning changes little at more
COLUMNS = ("hard", "held_out", "one_step", "guided", "final")


@dataclass(frozen=True)
class Case:
    """What all rows of a model and a seed share."""

    out: Path
    model: str
    seed: int
    trajectories: int
    images: int
    iterations: int | None
    widths: tuple[str, ...]
    variant: str
    final_images: int

    @property
    def shared(self) -> dict[str, Any]:
        """The settings of all stages."""
        return {"seed": self.seed, "device": os.environ["EDADM_STUDY_DEVICE"]}

    def run(self, name: str) -> RunFolder:
        """Returns a run folder."""
        from edadm_cli.artifacts import RunFolder

        return RunFolder(self.out / "runs" / self.model / f"seed{self.seed}" / name)

    def result(self, label: str, bits: str) -> Path:
        """Returns the file of a row."""
        name = f"{label} {bits}".replace(" ", "-").replace(":", "-")
        return self.out / "results" / self.model / f"seed{self.seed}" / f"{name}.json"


def prepare(case: Case) -> None:
    """Collects trajectories, chooses the calibration set and measures the layers."""
    from edadm_cli.collect.stage import run as collect
    from edadm_cli.config import CollectConfig, SensitivityConfig
    from edadm_cli.sensitivity.stage import run as measure_sensitivity

    folder = case.run("shared")
    collect(CollectConfig(model=case.model, num_trajectories=case.trajectories, **case.shared), folder)
    choose(case, folder)
    recipe = variant_recipe(case.variant, None)[0]
    sizes = {"activation_bits": (8,), "num_images": case.final_images}
    measure_sensitivity(SensitivityConfig(recipe=recipe, **sizes, **case.shared), folder)


def choose(case: Case, folder: RunFolder) -> None:
    """Chooses the calibration set."""
    from edadm_cli.config import SelectConfig
    from edadm_cli.select.stage import run as select

    recipe, samples = variant_recipe(case.variant, None)
    fields = {name: value for name, value in recipe.select.model_dump().items() if value is not None}
    select(SelectConfig(**{**fields, "num_samples": min(samples, case.trajectories)}, **case.shared), folder)


def measure(case: Case, label: str, bits: str, recipe: Recipe) -> None:
    """Reconstructs and judges a row, if that was not done before."""
    from study.learner_judge import judge

    from edadm_cli.artifacts import Units
    from edadm_cli.config import BitWidth, ReconstructConfig
    from edadm_cli.reconstruct.stage import run as reconstruct

    path = case.result(label, bits)
    if path.is_file():
        return
    folder = case.run(path.stem)
    link_collection(case.run("shared"), folder)
    choose(case, folder)
    name = equal_bits(bits)  # the rules of the recipe give each layer its own bits
    config = ReconstructConfig(bits=BitWidth.parse(name), recipe=recipe, batch_size=128, **case.shared)
    learned = reconstruct(config, folder)
    units = Units.load(folder.open("reconstruct", name)).units
    row = {"model": case.model, "bits": bits, "label": label, "seed": case.seed, "hard": learned.loss.last}
    row |= {"left": {unit.name: (unit.loss_before, unit.loss_after) for unit in units}}
    row |= judge(folder, name, case.seed, case.images, case.shared["device"]) | {"card": card(case.shared["device"])}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".new")
    aside.write_text(json.dumps(row), encoding="utf-8")
    aside.replace(path)
    print(json.dumps({key: row[key] for key in ("model", "seed", "bits", "label", *COLUMNS) if key in row}), flush=True)


def equal_bits(bits: str) -> str:
    """Returns the bit width in which all layers have the bits of a budget, rounded down, such as `w4a8`."""
    from edadm_cli.config import BitWidth

    width = BitWidth.parse(bits)
    return f"w{width.weight}a{width.activation}" if width.is_mixed else bits


def factor(case: Case, label: str, bits: str, layer: LayerSensitivity, width: int) -> float:
    """Returns by what a plan multiplies a layer's error at a number of bits."""
    nearest = 1 / (layer.learning_factor or 1.0)
    if label == PLANNED:
        return 1.0
    if label == NEAREST or width > LEARNED_BITS:
        return nearest
    losses: Mapping[str, tuple[float | None, float | None]] = json.loads(
        case.result(EQUAL, equal_bits(bits)).read_text()
    )["left"]
    before, after = losses.get(layer.unit, (None, None))
    return nearest * (after / before if before and after else 1.0)


def planned(case: Case, label: str, bits: str) -> dict[str, int]:
    """Returns the bits of each layer in a plan, for a budget or the average of equal bits."""
    import torch

    from edadm_cli.artifacts import Sensitivity
    from edadm_cli.calibrate.bit_budget import layer_costs, spend_budget
    from edadm_cli.calibrate.planning import plan_network
    from edadm_cli.config import BitWidth
    from edadm_cli.models.collected import CollectedRun
    from edadm_cli.models.denoiser_calls.calibration import CalibrationSet
    from edadm_cli.models.units import trace

    run, recipe, cpu = case.run("shared"), variant_recipe(case.variant, None)[0], torch.device("cpu")
    denoiser = CollectedRun.open(run).load_denoiser(cpu, "memory", "", lambda _: None)
    traced = trace(denoiser, *CalibrationSet.load(run.open("select")).call(torch.arange(1), cpu, torch.float32))
    measured = Sensitivity.load(run.open("sensitivity"))
    equal = plan_network(traced, recipe, BitWidth.parse(bits)).layers
    sizes = {layer.name: layer.num_weights for layer in measured.layers}
    average = sum(equal[name].weight_bits * size for name, size in sizes.items()) / sum(sizes.values())
    given = BitWidth.parse(bits)
    budget = given if given.is_mixed else BitWidth(weight=int(average), activation=8, average=average)
    layers = tuple(
        layer.model_copy(update={"weight_errors": {b: factor(case, label, bits, layer, b) * e for b, e in errors}})
        for layer in measured.layers
        for errors in [layer.weight_errors.items()]
    )
    costs = layer_costs(measured.model_copy(update={"layers": layers}), budget, recipe, denoiser, traced)
    return spend_budget(budget, [costs])


def work(row: tuple[Case, str, str]) -> None:
    """Measures a row; one that is planned after learning waits for that with equal bits, which was begun before it."""
    from edadm_cli.recipe import LayerRule

    case, label, bits = row
    recipe = variant_recipe(case.variant, case.iterations)[0]
    rules: tuple[LayerRule, ...] = ()
    if label != EQUAL:
        while label == LEARNED and not case.result(EQUAL, equal_bits(bits)).is_file():
            time.sleep(1)
        rules = tuple(LayerRule(pattern=name, weight_bits=b) for name, b in planned(case, label, bits).items())
    measure(case, label, bits, recipe.model_copy(update={"layers": (*recipe.layers, *rules)}))


def rows_of(cases: list[Case], labels: list[str]) -> list[tuple[Case, str, str]]:
    """Returns the rows of all models and seeds, those with equal bits first."""
    equal = [(case, EQUAL, bits) for case in cases for bits in dict.fromkeys(map(equal_bits, case.widths))]
    others = [(case, label, bits) for label in labels for bits in cases[0].widths for case in cases if label != EQUAL]
    return [*(equal if EQUAL in labels else []), *others]


def main() -> None:
    """Reads the command line and runs what is not finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the study lies")
    parser.add_argument("--models", default="digits-ddpm,digits-sd")
    parser.add_argument("--seeds", default="0-2", help="such as 0-2")
    parser.add_argument("--bits", default="w4a8,w3a8", help="bit widths and averages such as auto:4.5a8")
    parser.add_argument("--plans", default=",".join((EQUAL, PLANNED, NEAREST, LEARNED)), help="which kinds of rows")
    parser.add_argument("--variant", default="default", help="as in benchmarks/learner.py")
    parser.add_argument("--final-images", type=int, default=16, help="images by which the sensitivity is measured")
    parser.add_argument("--trajectories", type=int, default=256, help="number of trajectories per collection")
    parser.add_argument("--images", type=int, default=128, help="held-out trajectories")
    parser.add_argument("--iterations", type=int, help="at most so many optimizer steps per unit: for a trial")
    parser.add_argument("--devices", default="auto", help="cpu, or numbers of GPUs such as 0,1; auto takes all")
    parser.add_argument("--workers", type=int, default=1, help="rows at a time, over all devices")
    options = parser.parse_args()
    sizes = (options.trajectories, options.images, options.iterations, tuple(options.bits.split(",")))
    choices = (options.variant, options.final_images)
    seeds, models = seeds_of(options.seeds), options.models.split(",")
    cases = [Case(options.out, model, seed, *sizes, *choices) for seed in seeds for model in models]
    labels = options.plans.split(",")
    if LEARNED in labels and EQUAL not in labels:
        labels.append(EQUAL)
    context = multiprocessing.get_context("spawn")
    devices, names = context.Queue(), device_names(options.devices)
    for index in range(options.workers):
        devices.put(names[index % len(names)])
    with context.Pool(options.workers, begin, (devices,)) as pool:
        pool.map(prepare, cases, 1)
        pool.map(work, rows_of(cases, labels), 1)
        pool.close()
        pool.join()
    print(table(read_rows([options.out]), COLUMNS))


if __name__ == "__main__":
    main()
