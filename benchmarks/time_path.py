"""Measures what a table of the time embedding could bring: the error of a prediction with the time path in float.

    python benchmarks/time_path.py --models digits-ddpm digits-sd

A table with the outputs of the time path for every step would have no error. So its gain is at most that of leaving
these layers in floating point. Every layer is rounded to nearest with the ranges of `default`. The program prints the
relative L2 error of the prediction on the calibration set, with all layers quantized, all but those of the time path,
and only those.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from edadm_cli.artifacts import RunFolder
from edadm_cli.calibrate.nearest import nearest_params
from edadm_cli.calibrate.ranges import search_ranges
from edadm_cli.collect import stage as collect
from edadm_cli.config import BitWidth, CollectConfig, ReconstructConfig, SelectConfig
from edadm_cli.processes import ALONE
from edadm_cli.recipe import load_recipe
from edadm_cli.reconstruct.blocks import freeze_unit
from edadm_cli.reconstruct.context import ReconstructionContext
from edadm_cli.reconstruct.preparation import prepare
from edadm_cli.reconstruct.task import resolve_task
from edadm_cli.select import stage as select

PARTS: dict[str, Callable[[str], bool]] = {
    "all": lambda name: True,
    "all but the time path": lambda name: "time_emb" not in name,
    "the time path": lambda name: "time_emb" in name,
}


@torch.no_grad()
def predictions(context: ReconstructionContext) -> Tensor:
    """Returns the predictions for the whole calibration set, with shape `[rows, ...]`."""
    return torch.cat([context.network.denoiser(*args, **kwargs)[0] for args, kwargs in context.batches])


def errors(run: RunFolder, bits: str, device: str) -> list[float]:
    """Returns the relative errors of the predictions with each of `PARTS` quantized."""
    config = ReconstructConfig(bits=BitWidth.parse(bits), recipe=load_recipe("default"), device=device)
    task = resolve_task(config, run, ALONE)
    context = prepare(task)
    ranges = search_ranges(
        context.network.denoiser, context.traced, context.plan, config.recipe.ranges, context.batches
    )
    params = {**ranges, **nearest_params(context.network.float_weight, context.plan, ranges)}
    exact, measured = predictions(context), []
    for is_quantized in PARTS.values():
        context = prepare(task)
        for unit in context.units:
            layers = tuple(filter(is_quantized, unit.layers))
            freeze_unit(context.network, context.plan, replace(unit, layers=layers), params)
        measured.append(float((predictions(context) - exact).norm() / exact.norm()))
    return measured


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["digits-ddpm", "digits-sd"])
    parser.add_argument("--bits", nargs="+", default=["w4a8", "w8a8"])
    parser.add_argument("--trajectories", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    print("| model | bits | " + " | ".join(PARTS) + " |\n|---|---|" + "---|" * len(PARTS))
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder:
            run = RunFolder(Path(folder))
            collect.run(CollectConfig(model=model, num_trajectories=options.trajectories, device=options.device), run)
            select.run(SelectConfig(strategy="uniform", samples_per_trajectory=4), run)
            for bits in options.bits:
                values = " | ".join(f"{error:.4f}" for error in errors(run, bits, options.device))
                print(f"| {model} | {bits} | {values} |", flush=True)


if __name__ == "__main__":
    main()
