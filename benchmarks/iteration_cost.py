"""Times one optimizer step of a unit: with one quantized forward, or the three of a straightforward version.

    python benchmarks/iteration_cost.py
    python benchmarks/iteration_cost.py --device cuda --json

The straightforward version follows EDA-DM's released code (arXiv 2401.04585). In every iteration it runs one quantized
forward of the unit for the block loss, a second one with other drop masks for the losses of the layers inside, and a
full-precision one for their targets. This package computes all terms from one quantized forward and has the targets
already. Both versions use the same unit, the same stand-ins of its layers and the same rows; they alternate in one run,
and the median step is reported. On a GPU this package runs one CUDA graph, which the other version could do as well:
the comparison there is what a user gets.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from edadm_cli.artifacts import RunFolder
from edadm_cli.calibrate.planning import plan_network
from edadm_cli.calibrate.ranges import search_ranges
from edadm_cli.collect import stage as collect
from edadm_cli.config import BitWidth, CollectConfig, SelectConfig
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.denoiser_calls.calibration import CalibrationSet
from edadm_cli.models.loading import resolve_device
from edadm_cli.models.units import Unit, trace, units
from edadm_cli.quant.plan import QuantizationPlan
from edadm_cli.recipe import load_recipe
from edadm_cli.reconstruct.batches import Batches
from edadm_cli.reconstruct.call_signatures import probe_units
from edadm_cli.reconstruct.capture import capture_units, layer_outputs
from edadm_cli.reconstruct.hyperparameters import Hyperparameters, resolve
from edadm_cli.reconstruct.minibatch import MiniBatch
from edadm_cli.reconstruct.network import SwitchableNetwork
from edadm_cli.reconstruct.optimization import Optimization, make_step
from edadm_cli.reconstruct.rows import RowCache
from edadm_cli.reconstruct.trainer import UnitLearner
from edadm_cli.reconstruct.unit_data import UnitData, channel_loss, layer_targets
from edadm_cli.select import stage as select

WARM_UP = 5


@dataclass(frozen=True)
class Cost:
    """The median milliseconds of one optimizer step of a unit."""

    unit: str
    kind: str
    layers: int
    one_forward_ms: float
    three_forwards_ms: float

    @property
    def ratio(self) -> float:
        """Returns how many steps of this package take the time of one step of the other version."""
        return self.three_forwards_ms / self.one_forward_ms


@dataclass
class Study:
    """A denoiser before its reconstruction."""

    network: SwitchableNetwork
    plan: QuantizationPlan
    units: list[Unit]
    batches: Batches
    ranges: dict[str, Tensor]
    hyperparameters: Hyperparameters


def prepare(model: str, bits: BitWidth, device: torch.device, num_samples: int, batch_size: int) -> Study:
    """Collects a few trajectories in a temporary folder, plans the denoiser, and searches its ranges."""
    recipe = load_recipe("paper")
    given = {"iterations": 1000, "batch_size": batch_size, "layer_loss_weight": 0.8}
    learn = recipe.learn.model_copy(update=given)
    with tempfile.TemporaryDirectory() as place:
        run = RunFolder(Path(place))
        collect.run(CollectConfig(model=model, num_trajectories=num_samples, num_steps=5, device=str(device)), run)
        select.run(SelectConfig(device=str(device)), run)
        denoiser = CollectedRun.open(run).load(device, torch.float32).denoiser
        batches = Batches(CalibrationSet.load(run.open("select")), num_samples, device)
    (args, kwargs), *_ = iter(batches.few(1))
    traced = trace(denoiser, args, kwargs)
    plan = plan_network(traced, recipe, bits)
    network = SwitchableNetwork(denoiser, list(plan.layers), list(plan.attentions))
    ranges = search_ranges(denoiser, traced, plan, recipe.ranges, batches)
    listed = units(denoiser, traced, set(plan.layers), "block")
    return Study(network, plan, listed, batches, ranges, resolve(learn, None, bits))


def make_learner(study: Study, unit: Unit) -> UnitLearner:
    """Returns the unit with its stand-ins in place, and everything that it learns from."""
    denoiser, batches = study.network.denoiser, study.batches
    cache = RowCache(Path(tempfile.gettempdir()), 2**62, batches.device)  # all of it in memory
    with study.network.full_precision():
        forms = probe_units(denoiser, [unit], batches)
        (exact,) = capture_units(denoiser, [unit], forms, batches, cache, with_outputs=True)
    (quantized,) = capture_units(denoiser, [unit], forms, batches, cache, with_outputs=False)
    targets = layer_targets(study.network, unit, exact, batches.batch_size, cache)
    data = UnitData(exact, quantized, targets)
    return UnitLearner(study.network, unit, study.plan, study.ranges, data, study.hyperparameters, seed=0)


class ThreeForwards:
    """The straightforward step: two quantized forwards and a full-precision one per iteration."""

    def __init__(self, learner: UnitLearner, exact_unit: nn.Module, optimization: Optimization) -> None:
        self.learner, self.exact_unit, self.optimization = learner, exact_unit, optimization
        prefix = len(learner.unit.name) + 1
        self.inner = [name[prefix:] for name in learner.data.layer_targets]
        calls, device = learner.data.full_precision, learner.device
        self.targets = MiniBatch(calls.outputs, learner.share.size, device)
        self.exact = MiniBatch(calls.tensors, learner.share.size, device)

    def __call__(self) -> Tensor:
        """Takes one step on the rows that the learner chose."""
        self.optimization.decay()
        self.optimization.adam.zero_grad(set_to_none=True)
        self.targets.load(self.learner.rows)
        self.exact.load(self.learner.rows)
        (target,) = self.targets.tensors
        exact = self.exact.tensors
        mixed = [self._mix(x, other) for x, other in zip(exact, self.learner.groups["inputs"], strict=True)]
        loss = channel_loss(self._forward(self.learner.module, mixed, quantized=True), target)
        with layer_outputs(self.learner.module, self.inner) as outputs:
            self._forward(self.learner.module, mixed, quantized=True)
        with torch.no_grad(), layer_outputs(self.exact_unit, self.inner) as targets:
            self._forward(self.exact_unit, exact, quantized=False)
        weighted = zip(self.inner, self.learner.layer_weights, strict=True)
        loss = (
            loss + torch.stack([weight * channel_loss(outputs[name], targets[name]) for name, weight in weighted]).sum()
        )
        loss.backward()
        self.optimization.adam.step()
        self.learner.learned.scales.keep_positive()
        return loss.detach()

    def _mix(self, exact: Tensor, quantized: Tensor) -> Tensor:
        mask = self.learner.input_drop.mask(exact)
        return quantized if mask is None else torch.where(mask, exact, quantized)

    def _forward(self, module: nn.Module, tensors: list[Tensor], quantized: bool) -> Tensor:
        if quantized:
            self.learner.learned.materialize()
        args, kwargs = self.learner.data.full_precision.call(tensors)
        output: Tensor = module(*args, **kwargs)
        return output


def measure(study: Study, unit: Unit, steps: int) -> Cost:
    """Times both versions alternately."""
    exact_unit = copy.deepcopy(unit.module)
    learner = make_learner(study, unit)
    versions: dict[str, Callable[[], Tensor]] = {
        "one": make_step(learner, learner.optimization()),
        "three": ThreeForwards(learner, exact_unit, learner.optimization()),
    }
    times: dict[str, list[float]] = {name: [] for name in versions}
    for iteration in range(WARM_UP + steps):
        for name, step in versions.items():
            learner.set_iteration(iteration)
            times[name].append(_milliseconds(step, learner.device))
    one, three = (statistics.median(values[WARM_UP:]) for values in times.values())
    return Cost(unit.name, unit.kind, len(unit.layers), one, three)


def _milliseconds(step: Callable[[], Tensor], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) * 1e3


def report(costs: list[Cost], options: argparse.Namespace, device: torch.device) -> None:
    """Prints one JSON object, or a Markdown table."""
    if options.json:
        rows = [{**asdict(cost), "ratio": cost.ratio} for cost in costs]
        facts = {"model": options.model, "bits": options.bits, "device": str(device), "batch_size": options.batch_size}
        print(json.dumps({**facts, "threads": torch.get_num_threads(), "units": rows}))
        return
    print("| unit | layers | one forward, ms | three forwards, ms | ratio |\n|---|---|---|---|---|")
    for cost in costs:
        values = f"{cost.one_forward_ms:.2f} | {cost.three_forwards_ms:.2f} | {cost.ratio:.2f}"
        print(f"| {cost.kind}: {cost.unit} | {cost.layers} | {values} |")


def main() -> None:
    """Reads the command line and prints the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits-sd")
    parser.add_argument("--bits", default="w4a8")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=40, help="steps of each version that are timed after the warm-up")
    parser.add_argument("--batch-size", type=int, default=32, help="rows per step")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    device = resolve_device(options.device)
    study = prepare(options.model, BitWidth.parse(options.bits), device, options.batch_size, options.batch_size)
    first = {unit.kind: unit for unit in reversed(study.units) if unit.kind != "layer"}
    report([measure(study, unit, options.steps) for unit in first.values()], options, device)


if __name__ == "__main__":
    main()
