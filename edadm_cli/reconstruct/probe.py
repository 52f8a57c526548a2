"""What a reconstruction would cost, from a short probe.

Measured: one batch through the range search; one forward with the time at which each unit ends; a few optimizer steps
of a few units of each kind. The rest is arithmetic: how many passes the memory budget takes, how far into the denoiser
each of them goes, and the steps of the other units in proportion to their forward.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edadm_cli.artifacts import Estimate
from edadm_cli.calibrate.nearest import nearest_params
from edadm_cli.calibrate.ranges import search_ranges
from edadm_cli.models.units import Trace, Unit
from edadm_cli.quant.plan import QuantizationPlan
from edadm_cli.recipe import Recipe
from edadm_cli.reconstruct.capture import Batches, UnitForm, capture_units, probe_units
from edadm_cli.reconstruct.hyperparameters import Hyperparameters
from edadm_cli.reconstruct.learn import UnitData, UnitLearner, layer_targets
from edadm_cli.reconstruct.network import SwitchableNetwork
from edadm_cli.reconstruct.optimization import Optimization, make_step
from edadm_cli.reconstruct.rows import RowCache

_MIB = 2**20
_STEPS = 2
_PROBE_S = 40.0  # no further unit is probed after that
_LEARNER_COPIES = (
    11  # of a unit's weights, in float32: alpha, its gradient and moments, floor, scale, bounds, h, weights
)
_ACTIVATIONS = 12  # of the largest output, alive at once in a forward that learns


@dataclass(frozen=True)
class _Forward:
    """One forward of a batch.

    Attributes:
        seconds: Of all of it.
        ends: Share of it after which each unit is done.
        units: Seconds in each unit.
    """

    seconds: float
    ends: dict[str, float]
    units: dict[str, float]


def probe(
    network: SwitchableNetwork,
    traced: Trace,
    plan: QuantizationPlan,
    learning: Sequence[Unit],
    batches: Batches,
    recipe: Recipe,
    hyperparameters: Hyperparameters,
    memory_budget: int,
) -> Estimate:
    """Estimate a reconstruction; the network is left as it was.

    Args:
        network: The denoiser.
        traced: Its trace.
        plan: Bits of every layer.
        learning: Units that learn.
        batches: The calibration set.
        recipe: How ranges are found.
        hyperparameters: How units learn.
        memory_budget: Bytes for rows.
    """
    one = Batches(batches.calibration, batches.batch_size, batches.device, min(batches.batch_size, batches.num_samples))
    share = batches.num_samples / one.num_samples
    started = time.perf_counter()
    ranges = search_ranges(network.denoiser, traced, plan, recipe.ranges, one)
    seconds = share * (time.perf_counter() - started)
    weights = 4 * sum(parameter.numel() for parameter in network.denoiser.parameters())
    memory, disk = 3 * weights / 2, weights / 4  # codes by rounding and learned ones beside the weights
    if learning:
        forms = probe_units(network.denoiser, learning, batches)
        forward = _time_forward(network.denoiser, learning, one)
        with_layers = hyperparameters.layer_loss_weight > 0
        groups = group_units(learning, forms, batches.num_rows, memory_budget, with_layers)
        passes = sum(forward.ends[group[-1].name] for group in groups) + sum(forward.ends.values())
        targets = sum(forward.units.values()) if with_layers else 0.0
        evaluations = 2 * sum(forward.units.values())
        seconds += share * (passes * forward.seconds + targets + evaluations)
        nearest = nearest_params(network.float_weight, plan, ranges)
        seconds += hyperparameters.iterations * _step_seconds(
            network, plan, learning, forms, one, hyperparameters, nearest, forward
        )
        needs = [
            batches.num_rows * (forms[unit.name].call_bytes + forms[unit.name].learning_bytes(with_layers))
            for unit in learning
        ]
        largest = max(4 * sum(network.float_weight(name).numel() for name in unit.layers) for unit in learning)
        rows = max(hyperparameters.batch_size, batches.batch_size * batches.calibration.branches)
        widest = max(kind.bytes for form in forms.values() for kind in (*form.inputs, *form.layers.values()))
        memory += min(memory_budget, max(needs)) + _LEARNER_COPIES * largest + _ACTIVATIONS * rows * widest
        disk += max(0, max(needs) - memory_budget)
    return Estimate(seconds=seconds, memory_mib=memory / _MIB, disk_mib=disk / _MIB)


def group_units(
    learning: Sequence[Unit], forms: dict[str, UnitForm], rows: int, budget: int, with_layers: bool
) -> list[list[Unit]]:
    """Units that are captured in one pass."""
    groups: list[list[Unit]] = []
    calls = widest = 0
    for unit in learning:
        form = forms[unit.name]
        calls += form.call_bytes * rows
        widest = max(widest, form.learning_bytes(with_layers) * rows)
        if groups and calls + widest <= budget:
            groups[-1].append(unit)
        else:
            groups.append([unit])
            calls, widest = form.call_bytes * rows, form.learning_bytes(with_layers) * rows
    return groups


@torch.no_grad()
def _time_forward(denoiser: nn.Module, learning: Sequence[Unit], batches: Batches) -> _Forward:
    begun: dict[str, float] = {}
    ended: dict[str, float] = {}
    (args, kwargs), *_ = iter(batches)

    def note(times: dict[str, float], name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            times[name] = _now()

        return hook

    denoiser(*args, **kwargs)
    with ExitStack() as stack:
        for unit in learning:
            stack.callback(unit.module.register_forward_pre_hook(note(begun, unit.name)).remove)
            stack.callback(unit.module.register_forward_hook(note(ended, unit.name)).remove)
        started = _now()
        denoiser(*args, **kwargs)
        seconds = _now() - started
    ends = {name: (end - started) / seconds for name, end in ended.items()}
    return _Forward(seconds, ends, {name: ended[name] - begun[name] for name in ended})


def _step_seconds(
    network: SwitchableNetwork,
    plan: QuantizationPlan,
    learning: Sequence[Unit],
    forms: dict[str, UnitForm],
    batches: Batches,
    hyperparameters: Hyperparameters,
    nearest: dict[str, torch.Tensor],
    forward: _Forward,
) -> float:
    """Seconds of one optimizer step of every unit, one after the other: some measured, the others by their forward."""
    measured: dict[str, float] = {}
    kinds: dict[str, list[str]] = {}
    started = time.perf_counter()
    for unit in _spread(learning):
        if len(measured) and time.perf_counter() - started > _PROBE_S:
            break
        measured[unit.name] = _time_step(network, plan, unit, forms, batches, hyperparameters, nearest)
        kinds.setdefault(unit.kind, []).append(unit.name)
    everything = sum(measured.values()) / sum(forward.units[name] for name in measured)
    total = 0.0
    for unit in learning:
        alike = kinds.get(unit.kind, [])
        ratio = everything
        if alike:
            ratio = sum(measured[name] for name in alike) / sum(forward.units[name] for name in alike)
        total += measured.get(unit.name, ratio * forward.units[unit.name])
    return total


def _spread(learning: Sequence[Unit]) -> list[Unit]:
    """Units in an order that meets every kind early, and every depth."""
    by_kind: dict[str, list[Unit]] = {}
    for unit in learning:
        by_kind.setdefault(unit.kind, []).append(unit)
    order: list[Unit] = []
    step = 2
    while len(order) < len(learning):
        for group in by_kind.values():
            order += [unit for unit in group[:: max(1, len(group) // step)] if unit not in order]
        step *= 2
    return order


def _time_step(
    network: SwitchableNetwork,
    plan: QuantizationPlan,
    unit: Unit,
    forms: dict[str, UnitForm],
    batches: Batches,
    hyperparameters: Hyperparameters,
    nearest: dict[str, torch.Tensor],
) -> float:
    """Seconds of one step of one unit, on full-precision inputs."""
    few = hyperparameters.model_copy(update={"iterations": _STEPS + 1})
    with tempfile.TemporaryDirectory() as folder, _restored(network, unit):
        cache = RowCache(Path(folder), 2**62, batches.device)
        one = batches.one_sample()
        (calls,) = capture_units(network.denoiser, [unit], forms, one, cache, with_outputs=True)
        targets = {}
        if few.layer_loss_weight > 0:
            targets = layer_targets(network, unit, calls, one.num_rows, cache)
        learner = UnitLearner(network, unit, plan, nearest, UnitData(calls, calls, targets), few, seed=0)
        step = make_step(
            learner, Optimization([(learner.learned.rounding.alpha, 1e-3)], few.iterations, batches.device)
        )
        times = []
        for iteration in range(few.iterations):
            started = _now()
            learner.set_iteration(iteration)
            step()
            times.append(_now() - started)
        learner.batch.close()
    return min(times[1:])


@contextmanager
def _restored(network: SwitchableNetwork, unit: Unit) -> Iterator[None]:
    """Give a unit its own layers and processors back at the end."""
    try:
        yield
    finally:
        network.restore(unit.layers, unit.attentions)


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
