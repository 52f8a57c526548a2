"""Counts how often a reconstruction runs its calibration set through the denoiser, and what its steps multiply.

Only shapes are computed, on no device.

    python benchmarks/capture_passes.py --model sd15 --samples 256

A pass captures inputs or targets of units and stops after the last of them, so it counts as the share of the denoiser's
multiplications up to there. A straightforward version takes two full forwards per unit, one in full precision and one
partly quantized.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edadm_cli.models.architecture import load_architecture
from edadm_cli.models.denoiser_calls.calibration import CalibrationSet
from edadm_cli.models.denoiser_calls.calls import split_call
from edadm_cli.models.example_calls import example_call
from edadm_cli.models.units import Unit, trace, units
from edadm_cli.reconstruct.batches import Batches
from edadm_cli.reconstruct.call_signatures import UnitForm, probe_units
from edadm_cli.reconstruct.capture_groups import capture_groups

GIB = 2**30
META = torch.device("meta")


@dataclass(frozen=True)
class Counts:
    """The multiplications of a denoiser for one row, in FLOP (two per multiply-accumulate).

    Attributes:
        total: FLOP of one forward.
        ends: Share of the total after which each unit is done.
        units: FLOP of each unit.
    """

    total: int
    ends: dict[str, float]
    units: dict[str, int]


def build(model: str) -> nn.Module:
    """Returns the denoiser without weights."""
    architecture = load_architecture(model)
    with torch.device(META):
        cls: Any = architecture.component_class(architecture.denoiser_name)
        denoiser: nn.Module = cls(**architecture.config(architecture.denoiser_name))
    return denoiser.eval().requires_grad_(False)


def shapes_of_a_set(denoiser: nn.Module, num_samples: int) -> CalibrationSet:
    """Returns a calibration set with guidance that has shapes and no values."""
    args, kwargs = example_call(denoiser, batch_size=2)
    args = tuple(torch.tensor(0) if argument.ndim == 0 else argument for argument in args)  # a timestep has a value
    call = split_call(denoiser, args, kwargs)

    def spread(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty((num_samples, *tensor.shape[1:]), dtype=tensor.dtype, device=META)

    condition = {name: spread(tensor) for name, tensor in call.condition.items()}
    return CalibrationSet(
        sample=spread(call.sample),
        timestep=torch.empty(num_samples, dtype=torch.int64, device=META),
        step_index=torch.zeros(num_samples),
        trajectory_index=torch.zeros(num_samples),
        condition=condition,
        unconditional=condition,
        constants=call.constants,
        template=call.template,
        branches=2,
        collected_in="float32",
    )


@torch.no_grad()
def count(denoiser: nn.Module, listed: list[Unit], batches: Batches) -> Counts:
    """Counts the multiplications of one row in each unit."""
    begun: dict[str, int] = {}
    ended: dict[str, int] = {}
    args, kwargs = batches.call([0])
    with FlopCounterMode(display=False) as counter:

        def note(places: dict[str, int], name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                places[name] = counter.get_total_flops()

            return hook

        handles = [unit.module.register_forward_pre_hook(note(begun, unit.name)) for unit in listed]
        handles += [unit.module.register_forward_hook(note(ended, unit.name)) for unit in listed]
        denoiser(*args, **kwargs)
    for handle in handles:
        handle.remove()
    total, rows = counter.get_total_flops(), batches.calibration.branches
    ends = {name: end / total for name, end in ended.items()}
    return Counts(total // rows, ends, {name: (ended[name] - begun[name]) // rows for name in ended})


def report(listed: list[Unit], forms: dict[str, UnitForm], counts: Counts, rows: int, budgets: list[float]) -> None:
    """Prints both tables."""
    number = len(listed)
    largest = max(rows * (forms[u.name].call_bytes + forms[u.name].learning_bytes(True)) for u in listed)
    print(f"{number} units, {counts.total / 1e12:.3f} TFLOP per row and forward, {rows} rows")
    print(f"largest unit: {largest / GIB:.1f} GiB of inputs, targets and layer targets")
    quantized = sum(counts.ends[unit.name] for unit in listed)
    print("\n| budget, GiB | full-precision passes | quantized passes | in whole forwards | two per unit |")
    print("|---|---|---|---|---|")
    for budget in budgets:
        groups = capture_groups(listed, forms, rows, int(budget * GIB), with_layers=True)
        exact = sum(counts.ends[group[-1].name] for group in groups)
        print(f"| {budget:g} | {len(groups)} | {number} | {exact + quantized:.1f} | {2 * number} |")
    inside = sum(counts.units.values()) / 1e12
    print(f"\nOne step of every unit, per row: {3 * inside:.3f} TFLOP forward and backward.")


def main() -> None:
    """Reads the command line and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd15", help="the architecture of a UNet with guidance")
    parser.add_argument("--samples", type=int, default=256, help="size of the calibration set")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1, 4, 16, 64], help="GiB")
    options = parser.parse_args()
    denoiser = build(options.model)
    batches = Batches(shapes_of_a_set(denoiser, options.samples), 4, META)
    (args, kwargs), *_ = iter(batches.few(1))
    traced = trace(denoiser, args, kwargs)
    listed = units(denoiser, traced, set(traced.names), "block")
    forms = probe_units(denoiser, listed, batches)
    report(listed, forms, count(denoiser, listed, batches), batches.num_rows, options.budgets)


if __name__ == "__main__":
    main()
