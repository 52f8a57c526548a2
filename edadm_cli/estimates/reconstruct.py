"""Estimates the cost of a reconstruction from a short probe.

The probe measures one forward of a few rows, with the times at which each unit begins and ends, and every kind of work
on a few units (`unit_timing`). The rest is computed: the same work on the other units (`cost_model`), the number of
passes that the memory budget needs, and the depth of each pass in the denoiser. Writing rows to disk and reading them
is not included.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from edadm_cli.artifacts import Estimate, RunFolder
from edadm_cli.config import ReconstructConfig
from edadm_cli.errors import InputError
from edadm_cli.estimates.cost_model import CostFit, Measure, Size
from edadm_cli.estimates.unit_timing import (
    Forward,
    Stopwatch,
    Timed,
    Work,
    chosen_units,
    kind_of,
    time_forward,
    time_units,
)
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.gpu_memory import gpu_peak
from edadm_cli.models.stored import is_stored, num_weights
from edadm_cli.models.units import Unit
from edadm_cli.processes import ALONE
from edadm_cli.recipe import RangeRecipe
from edadm_cli.reconstruct.call_signatures import UnitForm
from edadm_cli.reconstruct.capture_groups import capture_groups
from edadm_cli.reconstruct.context import ReconstructionContext
from edadm_cli.reconstruct.finished import FinishedUnits, find_links
from edadm_cli.reconstruct.hyperparameters import Hyperparameters
from edadm_cli.reconstruct.memory import fixed_budget, memory_left, working_bytes
from edadm_cli.reconstruct.preparation import arithmetic, prepare
from edadm_cli.reconstruct.rows import RowCache
from edadm_cli.reconstruct.task import resolve_task
from edadm_cli.reconstruct.unit_data import EVALUATED_ROWS

_MIB = 2**20
_BYTES_PER_SECOND = 6e8  # of the artifact: written, synced and hashed
_RANGING_S, _LEARNING_S = 6.0, 10.0  # seconds after which no further unit is measured
_PROBED_ROWS = 3  # rows of the two forwards of `probe_units` together
_DEPENDS: dict[Work, tuple[Measure, ...]] = {
    "weights": ("weights", "layers"),
    "activations": ("forward", "layers"),
    "search": ("layers",),
    "nearest": ("weights", "layers"),
    "freeze": ("weights", "layers"),
    "frozen": ("forward", "weights"),
    "setup": ("weights", "layers"),
    "evaluation": ("forward", "weights"),
    "step": ("forward", "weights"),
}


def estimate(config: ReconstructConfig, run_folder: RunFolder) -> Estimate:
    """Estimates time, memory and disk from a forward of a few rows and every kind of work on a few units."""
    started = time.monotonic()
    task = resolve_task(config, run_folder, ALONE)
    costs, loading = [], 0.0
    with arithmetic(task):
        for place in CollectedRun.open(run_folder).places:
            context = prepare(task, place)
            loading += time.monotonic() - started
            budget = fixed_budget(task.config.memory_budget_mib, task.device)
            costs.append(probe(context, task.config.recipe.ranges, task.hyperparameters, budget))
            started = time.monotonic()
    return Estimate(
        seconds=loading + sum(cost.seconds for cost in costs),
        memory_mib=max(cost.memory_mib for cost in costs),
        host_memory_mib=None if task.device.type != "cuda" else max(cost.host_memory_mib or 0.0 for cost in costs),
        disk_mib=sum(cost.disk_mib for cost in costs),
    )


def probe(
    context: ReconstructionContext, ranges: RangeRecipe, hyperparameters: Hyperparameters, memory_budget: int | None
) -> Estimate:
    """Estimates a reconstruction, without changing the network.

    Args:
        context: What is reconstructed.
        ranges: How ranges are found.
        hyperparameters: How units learn.
        memory_budget: Bytes for rows; `None` for what the work leaves of the GPU's memory.
    """
    every, some = chosen_units(context.units, context), chosen_units(context.learning, context)
    captured = {unit.name for unit in (*every, *some)}
    with gpu_peak(context.network.device) as forward_peak:
        forward = time_forward(context.network.denoiser, context.units, captured, context.batches)
    stopwatch = Stopwatch(context, ranges, forward)
    parts = _Parts(context, hyperparameters, forward)
    with gpu_peak(context.network.device) as ranging_peak:
        parts.add(time_units(every, stopwatch.ranging, _RANGING_S))
    codes = float(sum(context.num_weights(unit) for unit in context.units))  # one byte each in the artifact
    activations = max(forward_peak.bytes, ranging_peak.bytes) / forward.rows * parts.batch_rows
    working, disk = activations, codes
    seconds = parts.ranging(ranges.pooled) + codes / _BYTES_PER_SECOND
    if context.learning:
        parts.add(time_units(some, partial(stopwatch.learning, hyperparameters=hyperparameters), _LEARNING_S))
        forms = _forms(context, forward)
        working = working_bytes(context, hyperparameters, forms, activations)
        budget = memory_left(context.network.device, working) if memory_budget is None else memory_budget
        stored, filed = _stored_outputs(context, hyperparameters, forms, budget)
        calls_budget = budget - max(stored.values())
        seconds += parts.passes(forms, calls_budget) + parts.learning()
        rows, more_filed = _rows(context, hyperparameters, forms, stored, budget)
        working, disk = working + rows, disk + filed + more_filed
    weights = _weights(context)
    on_gpu = context.network.device.type == "cuda"
    return Estimate(
        seconds=seconds,
        memory_mib=(weights + working + (0 if on_gpu else codes)) / _MIB,
        host_memory_mib=codes / _MIB if on_gpu else None,
        disk_mib=disk / _MIB,
    )


def _weights(context: ReconstructionContext) -> float:
    """Returns the bytes of the weights on the device: those in memory, two that are being read, and packed codes."""
    denoiser, plan = context.network.denoiser, context.plan
    held = 4 * sum(parameter.numel() for parameter in denoiser.parameters())
    stored = max((4 * num_weights(module) for module in denoiser.modules() if is_stored(module)), default=0)
    packed = sum(
        plan.layers[name].stored_bits_per_weight / 8 * num_weights(layer)
        for name, layer in context.network.float_layers.items()
    )
    return held + 2 * stored + packed


class _Parts:
    """Computes the seconds of the parts of a reconstruction.

    Args:
        context: What is reconstructed.
        hyperparameters: How units learn.
        forward: A timed forward.
    """

    def __init__(self, context: ReconstructionContext, hyperparameters: Hyperparameters, forward: Forward) -> None:
        self.context, self.hyperparameters, self.forward = context, hyperparameters, forward
        self.sizes = {unit.name: self._size(unit) for unit in context.units}
        self.fits: dict[Work, CostFit] = {}
        batches = context.batches
        self.rows = batches.num_rows
        self.batch_rows = min(batches.batch_size, batches.num_samples) * batches.calibration.branches
        self.calls = self.rows / self.batch_rows

    def add(self, measured: Mapping[Work, Mapping[str, Timed]]) -> None:
        """Adds measurements of more kinds of work."""
        for work, calls in measured.items():
            self.fits[work] = CostFit(self.sizes, calls, _DEPENDS[work])

    def ranging(self, pooled: bool) -> float:
        """Returns the seconds of the search for scales and ranges, and of rounding to nearest."""
        fits, names = self.fits, self.sizes
        once = sum(fits["weights"].seconds(name) + fits["nearest"].seconds(name) for name in names)
        once += (1 if pooled else self.calls) * sum(fits["search"].seconds(name) for name in names)
        a_call = sum(
            fits["activations"].seconds(name, self.batch_rows) for name in names
        )  # includes the units' forwards
        return once + self.calls * (a_call + self.batch_rows * self._beside(self.forward.seconds, names))

    def passes(self, forms: dict[str, UnitForm], memory_budget: int) -> float:
        """Returns the seconds of all passes that capture calls, and of `probe_units` before them."""
        units, learning = self.context.units, self.context.learning
        a_row = 1 / self.forward.rows
        groups = capture_groups(learning, forms, self.rows, memory_budget, self._with_layers)
        exact = a_row * sum(self.forward.ends[group[-1].name] for group in groups)
        quantized = frozen = 0.0  # seconds per call: of all passes, and of the units that are no stubs yet
        for number, unit in enumerate(units):
            if unit in learning:
                before = [other.name for other in units[:number]]
                quantized += frozen + self.batch_rows * self._beside(self.forward.begins[unit.name], before)
                frozen = 0.0  # this pass stores what they give
            frozen += self.fits["frozen"].seconds(unit.name, self.batch_rows)
        return _PROBED_ROWS * a_row * self.forward.seconds + self.rows * exact + self.calls * quantized

    def learning(self) -> float:
        """Returns the seconds of the work between the passes: targets, set-up, evaluations, steps, freezing."""
        fits, hyperparameters = self.fits, self.hyperparameters
        chunk = min(self.rows, max(hyperparameters.batch_size, EVALUATED_ROWS, self.forward.rows))
        total = sum(fits["freeze"].seconds(name) for name in self.sizes)
        for unit in self.context.learning:
            total += self.rows * self.sizes[unit.name].forward if self._with_layers else 0.0
            total += fits["setup"].seconds(unit.name)
            total += 3 * self.rows / chunk * fits["evaluation"].seconds(unit.name, chunk)
            total += hyperparameters.iterations * fits["step"].seconds(unit.name, hyperparameters.batch_size)
        return total + (self._together() if hyperparameters.network_iterations else 0.0)

    def _together(self) -> float:
        """Returns the seconds in which all units learn together: targets, evaluations before and after, and steps."""
        fits, numbers = self.fits, self.hyperparameters
        rows = numbers.network_samples * self.context.batches.calibration.branches
        passes = sum(fits["evaluation"].seconds(unit.name, self.batch_rows) for unit in self.context.learning)
        step = sum(fits["step"].seconds(unit.name, numbers.network_batch_size) for unit in self.context.learning)
        forwards = rows / self.forward.rows * self.forward.seconds
        return forwards + 4 * rows / self.batch_rows * passes + numbers.network_iterations * step

    @property
    def _with_layers(self) -> bool:
        return self.hyperparameters.layer_loss_weight > 0

    def _size(self, unit: Unit) -> Size:
        spent = self.forward.ends[unit.name] - self.forward.begins[unit.name]
        return Size(kind_of(unit), spent / self.forward.rows, self.context.num_weights(unit), len(unit.layers))

    def _beside(self, seconds: float, names: Sequence[str] | Mapping[str, Size]) -> float:
        """Returns the seconds per row that a forward spends outside of some units, within its first `seconds`."""
        return max(0.0, seconds / self.forward.rows - sum(self.sizes[name].forward for name in names))


def _forms(context: ReconstructionContext, forward: Forward) -> dict[str, UnitForm]:
    """Returns the forms of the calls of all units; one that does not learn may have none.

    Raises:
        InputError: A unit that learns has no input with rows.
    """
    forms = {unit.name: forward.shapes[unit.name].form(unit.name, forward.rows) for unit in context.learning}
    for unit in context.units:
        with suppress(InputError):
            forms.setdefault(unit.name, forward.shapes[unit.name].form(unit.name, forward.rows))
    return forms


def _stored_outputs(
    context: ReconstructionContext, hyperparameters: Hyperparameters, forms: dict[str, UnitForm], budget: int
) -> tuple[dict[str, int], int]:
    """Returns the bytes of the stored outputs of finished units: in memory while each unit learns, and in files."""
    denoiser, batches = context.network.denoiser, context.batches
    links = find_links(denoiser, context.units, forms, batches)

    def stored(memory: int) -> dict[str, int]:
        cache = RowCache(Path(), memory, context.network.device)  # nothing is allocated in it
        mixes_inputs = hyperparameters.input_drop > 0
        finished = FinishedUnits(denoiser, context.units, links, forms, cache, batches.num_rows, mixes_inputs)
        return {unit.name: finished.expected_bytes([unit.name]) for unit in context.learning}

    in_memory, everything = stored(budget), stored(sys.maxsize)
    return in_memory, max(everything[name] - size for name, size in in_memory.items())


def _rows(
    context: ReconstructionContext,
    hyperparameters: Hyperparameters,
    forms: dict[str, UnitForm],
    stored: Mapping[str, int],
    budget: int,
) -> tuple[int, int]:
    """Returns the bytes of rows in memory and in files, while the unit learns that needs most."""
    number, with_layers = context.batches.num_rows, hyperparameters.layer_loss_weight > 0
    groups = capture_groups(context.learning, forms, number, budget - max(stored.values()), with_layers)
    most = 0
    for group in groups:
        for place, unit in enumerate(group):  # the calls of the units before it are released
            calls = sum(forms[waiting.name].call_bytes for waiting in group[place:])
            needed = number * (calls + forms[unit.name].learning_bytes(with_layers))
            most = max(most, needed + stored[unit.name])
    return min(budget, most), max(0, most - budget)
