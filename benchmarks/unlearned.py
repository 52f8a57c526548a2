"""Measure ways to quantize without learning: the one-step error on trajectories that gave no ranges.

    edadm collect --model digits-sd --num-trajectories 64 --device cpu --run RUN
    edadm select --samples-per-trajectory 4 --run RUN
    python benchmarks/unlearned.py RUN w4a8:nearest w4a8:gptq w4a4:nearest 'w4a4:hadamard-64@*transformer_blocks*'

A case is bits and a rounding, or bits, a transform and the layers that have it. The first three quarters of the
trajectories give ranges and energies, the others judge: relative L2 of the predictions to full precision.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edadm_cli.artifacts import RunFolder
from edadm_cli.calibrate.gptq import gptq_params
from edadm_cli.calibrate.nearest import nearest_params
from edadm_cli.calibrate.planning import plan_network
from edadm_cli.calibrate.ranges import search_ranges
from edadm_cli.config import BitWidth
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.denoiser_calls.calibration import CalibrationSet
from edadm_cli.models.units import trace
from edadm_cli.quant.network import load_quant_params, quantize_network
from edadm_cli.recipe import TransformRule, load_recipe

BATCH = 64
CPU = torch.device("cpu")


@torch.no_grad()
def error_of(run: RunFolder, case: str) -> float:
    """Returns the relative L2 error of the predictions of one case."""
    calibration = CalibrationSet.load(run.open("select"))
    bits, _, kind = case.partition(":")
    border = 3 * (int(calibration.trajectory_index.max()) + 1) // 4
    is_judge = (calibration.trajectory_index >= border).tolist()

    def calls(judge: bool) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        rows = [row for row, chosen in enumerate(is_judge) if chosen == judge]
        return [calibration.call(rows[i : i + BATCH], CPU, torch.float32) for i in range(0, len(rows), BATCH)]

    learned_from, held_out = calls(judge=False), calls(judge=True)
    denoiser = CollectedRun.open(run).load_denoiser(CPU, "memory")
    expected: list[Tensor] = [denoiser(*args, **kwargs)[0] for args, kwargs in held_out]
    recipe, (name, _, pattern) = load_recipe("default"), kind.partition("@")
    if pattern:
        recipe = recipe.model_copy(update={"transforms": (TransformRule(name=name, pattern=pattern),)})
    traced = trace(denoiser, *learned_from[0])
    plan = plan_network(traced, recipe, BitWidth.parse(bits))
    ranges = search_ranges(denoiser, traced, plan, recipe.ranges, learned_from, transforms=recipe.transforms)
    if kind == "gptq":
        params = gptq_params(denoiser, traced, plan, ranges, learned_from)
    else:
        params = nearest_params(lambda layer: denoiser.get_submodule(layer).get_parameter("weight"), plan, ranges)
    quantize_network(denoiser, plan)
    load_quant_params(denoiser, params)
    outputs: list[Tensor] = [denoiser(*args, **kwargs)[0] for args, kwargs in held_out]
    return float((torch.cat(outputs) - torch.cat(expected)).norm() / torch.cat(expected).norm())


def main() -> None:
    """Prints the error of every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("cases", nargs="+")
    arguments = parser.parse_args()
    for case in arguments.cases:
        print(f"{case}: {error_of(RunFolder(arguments.run), case):.4f}", flush=True)


if __name__ == "__main__":
    main()
