"""Measures what each layer of a learned reconstruction does to the final sample, beside nearest rounding and GPTQ.

    edadm run --model digits-ddpm --bits w4a8 --run RUN
    python benchmarks/layer_effects.py RUN --bits w4a8
    python benchmarks/layer_effects.py RUN --bits w4a8 --sampled 8

For each layer and unit it prints the relative L2 distance of the final sample that its weights cause to first order,
with everything else at full precision: rounded to nearest, rounded by GPTQ, and as learned. The changes of a unit's
layers add up with their signs. Below is how well the first two, and their geometric mean, predict the third one:
rank correlation, and the standard deviation of the logarithm of the ratio of squared distances, in decades.

With `--sampled N` nothing learned is read. Instead the sampler runs with each layer alone rounded to nearest, N images
per layer, and the table has the measured distances beside those to first order. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor

from edadm_cli.artifacts import RunFolder
from edadm_cli.artifacts.quantization import load_plan
from edadm_cli.calibrate.gptq import gptq_params
from edadm_cli.calibrate.planning import plan_network
from edadm_cli.calibrate.ranges import search_weight_scales
from edadm_cli.config import BitWidth, SensitivityConfig
from edadm_cli.metrics.distances import relative_l2
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.pipeline_calls.backward_sweep import random_directions
from edadm_cli.models.pipeline_calls.recorded_sampling import record_sampling
from edadm_cli.models.pipeline_calls.sampling import sample, sample_with_gradients
from edadm_cli.models.units import trace, units
from edadm_cli.quant.plan import LayerPlan, QuantizationPlan
from edadm_cli.recipe import load_recipe
from edadm_cli.sensitivity import building
from edadm_cli.sensitivity.candidates import LayerCandidates, weight_change
from edadm_cli.sensitivity.effects import measure_effects
from edadm_cli.sensitivity.task import Task, resolve_task

AT_ONCE = 8  # images
NEAREST, GPTQ, LEARNED, SAMPLED = "nearest", "GPTQ", "learned", "sampled"


def main() -> None:
    """Reads the command line and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder with its calibration set")
    parser.add_argument("--bits", default="w4a8")
    parser.add_argument("--recipe", default="default", help="its ranges and the bits of its edges are taken")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--sampled", type=int, default=0, help="images per layer, to measure distances by sampling")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    run, recipe = RunFolder(options.run), load_recipe(options.recipe)
    task = resolve_task(SensitivityConfig(recipe=recipe, device=options.device), run)
    (part, *_), model = building.parts_of(task), task.collected.load(task.device, torch.float32)
    model.pipeline.components[model.denoiser_name].requires_grad_(False)
    calls = part.calls()
    traced = trace(model.denoiser, *calls[0])
    quantized = plan_network(traced, recipe, BitWidth.parse(options.bits)).layers
    plan = QuantizationPlan(
        layers={
            name: LayerPlan(weight_bits=each.weight_bits, channel_parts=each.channel_parts)
            for name, each in quantized.items()
        }
    )
    scales = search_weight_scales(traced, plan, recipe.ranges.model_copy(update={"weight": "search"}))
    weights = {name: model.denoiser.get_submodule(name).get_parameter("weight").detach() for name in plan.layers}
    changes = {NEAREST: {name: weight_change(weights[name], name, each, scales) for name, each in plan.layers.items()}}
    if not options.sampled:
        changes[GPTQ] = differences(plan, gptq_params(model.denoiser, traced, plan, scales, calls), weights)
        artifact = run.open("reconstruct", options.bits)
        changes[LEARNED] = differences(load_plan(artifact), artifact.tensors("quant_params.safetensors"), weights)
    effects, energy = measured(task, model, changes, plan, part.num_steps, options.images)
    distances = {
        kind: {name: typical(each[:, number], energy) for name, each in effects.items()}
        for number, kind in enumerate(changes)
    }
    if options.sampled:
        distances[SAMPLED] = sampled(task, model, changes[NEAREST], options.sampled)
        print_table("layer", distances)
        compare("layers", distances, SAMPLED, [NEAREST])
        return
    of_units: dict[str, dict[str, float]] = {kind: {} for kind in changes}
    for unit in units(model.denoiser, traced, set(plan.layers), "block"):
        together = torch.stack([effects[name] for name in unit.layers]).sum(0)
        for number, kind in enumerate(changes):
            of_units[kind][unit.name] = typical(together[:, number], energy)
    print_table("layer", distances)
    print_table("unit", of_units)
    for what, table in (("layers", distances), ("units", of_units)):
        table["geometric mean"] = {name: math.sqrt(table[NEAREST][name] * table[GPTQ][name]) for name in table[GPTQ]}
        compare(what, table, LEARNED, [NEAREST, GPTQ, "geometric mean"])


def differences(
    plan: QuantizationPlan, params: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Returns the deployed weight of each layer minus its weight."""
    result = {}
    for name, weight in weights.items():
        parts = plan.layers[name].part_names(name)
        scales = [params[f"{part}.weight_scale"].reshape(-1, *[1] * (weight.dim() - 1)) for part in parts]
        codes = [params[f"{part}.weight_int"].float() for part in parts]
        rounded = torch.cat([code * scale for code, scale in zip(codes, scales, strict=True)], 1)
        result[name] = rounded.to(weight) - weight
    return result


def measured(
    task: Task,
    model: LoadedModel,
    changes: Mapping[str, Mapping[str, Tensor]],
    plan: QuantizationPlan,
    num_steps: int,
    images: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """Returns of each layer <v, change of the final sample> `[K, kinds, N]`, and the final samples' energy `[N]`."""
    numbers, sampling = tuple(range(2, 2 + len(changes))), task.collected.sampling
    candidates = {
        name: LayerCandidates(
            model.denoiser.get_submodule(name),
            numbers,
            (),
            (),
            (),
            torch.stack([each[name] for each in changes.values()]),
            layer,
            (),
        )
        for name, layer in plan.layers.items()
    }
    effects: dict[str, list[Tensor]] = {name: [] for name in candidates}
    energies = []
    for start in range(0, min(images, len(sampling.seeds)), AT_ONCE):
        chosen = slice(start, min(start + AT_ONCE, images))
        recorded = record_sampling({"": model.denoiser}, generator(task, model, chosen, sample_with_gradients))
        directions = random_directions(recorded.final, sampling.seeds[chosen], 0)
        found = measure_effects(recorded, {"": model.denoiser}, {"": candidates}, directions, {"": num_steps})
        for name, each in found.layers[""].items():
            effects[name].append(each)
        energies.append(recorded.final.detach().double().flatten(1).square().sum(1))
    return {name: torch.cat(each, 2) for name, each in effects.items()}, torch.cat(energies)


def generator(task: Task, model: LoadedModel, images: slice, function: Callable[..., Tensor]) -> Callable[[], Tensor]:
    """Returns a function that samples some images of the collection."""
    sampling = task.collected.sampling
    return lambda: function(
        model,
        seeds=sampling.seeds[images],
        prompts=None if sampling.prompts is None else sampling.prompts[images],
        num_steps=sampling.num_steps,
        guidance_scale=sampling.guidance_scale,
    )


def typical(products: Tensor, energy: Tensor) -> float:
    """Returns the relative L2 distance, as a geometric mean over the images, from inner products `[K, N]`."""
    return math.sqrt(building.typical_error((products.square().mean(0) / energy).tolist()))


def sampled(task: Task, model: LoadedModel, changes: Mapping[str, Tensor], images: int) -> dict[str, float]:
    """Returns the distance of final samples with each layer alone changed, as a geometric mean over the images."""
    generate = generator(task, model, slice(0, images), lambda *args, **kwargs: sample(*args, **kwargs).latents)
    exact, distances = generate(), {}
    for name, change in changes.items():
        weight = model.denoiser.get_submodule(name).get_parameter("weight")
        original = weight.detach().clone()
        with torch.no_grad():
            weight.add_(change)
            distances[name] = float(relative_l2(generate(), exact).clamp_min(1e-9).log().mean().exp())
            weight.copy_(original)
    return distances


def print_table(what: str, table: Mapping[str, Mapping[str, float]]) -> None:
    """Prints distances by name and kind."""
    print(f"\n| {what} | {' | '.join(table)} |\n|---|{'---|' * len(table)}")
    for name in next(iter(table.values())):
        print(f"| {name} | {' | '.join(f'{each[name]:.5f}' for each in table.values())} |")


def compare(what: str, table: Mapping[str, Mapping[str, float]], truth: str, kinds: list[str]) -> None:
    """Prints how well some distances predict others."""
    names = list(table[truth])
    for kind in kinds:
        pairs = [(table[kind][name], table[truth][name]) for name in names]
        spread = torch.tensor([2 * math.log10(max(b, 1e-15) / max(a, 1e-15)) for a, b in pairs]).std()
        rank = spearmanr(*zip(*pairs, strict=True)).statistic
        print(f"{what}: {kind} against {truth}: rank correlation {rank:.3f}, spread {float(spread):.2f} decades")


if __name__ == "__main__":
    main()
