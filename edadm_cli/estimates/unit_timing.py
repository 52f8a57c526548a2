"""Measures the parts of an estimate: one forward, unit by unit, and every kind of work on a few units.

It times the functions that a reconstruction itself calls, on the first samples of the calibration set. Values that do
not influence the time are computed in a quicker way than the recipe's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from edadm_cli.calibrate.nearest import nearest_params
from edadm_cli.calibrate.ranges import search_activation_ranges, search_ranges, search_weight_scales
from edadm_cli.hooks import Hooks
from edadm_cli.models.families import Call
from edadm_cli.models.units import Trace, Unit
from edadm_cli.quant.plan import QuantizationPlan
from edadm_cli.recipe import RangeRecipe
from edadm_cli.reconstruct.batches import Batches
from edadm_cli.reconstruct.blocks import freeze_unit
from edadm_cli.reconstruct.call_signatures import Shapes, noted_shapes
from edadm_cli.reconstruct.capture import capture_call
from edadm_cli.reconstruct.context import ReconstructionContext
from edadm_cli.reconstruct.hyperparameters import Hyperparameters
from edadm_cli.reconstruct.optimization import make_step
from edadm_cli.reconstruct.rows import RowCache
from edadm_cli.reconstruct.trainer import UnitLearner
from edadm_cli.reconstruct.unit_data import UnitData, layer_targets

Work = Literal["weights", "activations", "search", "nearest", "freeze", "frozen", "setup", "evaluation", "step"]

_MOST_UNITS, _FEWEST_UNITS = 12, 4
_FORWARD_S = 4.0  # a forward takes as many rows as fit into these seconds
_QUICK_S = 0.3  # work that takes fewer seconds is timed again, and the shortest time counts
_REPEATS = 3
_STEP_S, _STEP_FORWARDS = 1.5, 4  # a step has as many rows as fit into the seconds, at about this many forwards
_CANDIDATES = 4  # candidates of a weight's threshold that are timed; the others take as long

T = TypeVar("T")
Timed = tuple[int, float]  # rows and seconds


@dataclass(frozen=True)
class Forward:
    """The times of one forward at full precision.

    Attributes:
        rows: The rows of its batch.
        seconds: The seconds that the whole forward takes.
        begins: The seconds after its start at which each unit begins.
        ends: The seconds after its start at which each unit ends.
        shapes: The shapes of the arguments of every unit's call.
        calls: The arguments of the units that were captured, by name.
    """

    rows: int
    seconds: float
    begins: dict[str, float]
    ends: dict[str, float]
    shapes: dict[str, Shapes]
    calls: dict[str, Call]


def time_forward(denoiser: nn.Module, units: Sequence[Unit], captured: Collection[str], batches: Batches) -> Forward:
    """Times a forward of one row and, if that is quick, one with as many rows of a batch as take a few seconds.

    Args:
        denoiser: The denoiser at full precision.
        units: All of its units.
        captured: Names of the units whose arguments are captured.
        batches: The calibration set.
    """
    forward = _time_forward(denoiser, units, captured, batches.few(1))
    rows = int(_FORWARD_S / forward.seconds)
    return forward if rows < 2 else _time_forward(denoiser, units, captured, batches.few(rows))


@torch.no_grad()
def _time_forward(denoiser: nn.Module, units: Sequence[Unit], captured: Collection[str], one: Batches) -> Forward:
    begins: dict[str, float] = {}
    ends: dict[str, float] = {}
    calls: dict[str, Call] = {}

    def begin(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            begins[name] = _now()
            if name in captured:
                calls[name] = args, kwargs

        return hook

    def end(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            ends[name] = _now()

        return hook

    (args, kwargs), *_ = iter(one)
    with noted_shapes(denoiser, units) as shapes, Hooks() as hooks:
        for unit in units:
            hooks.before(unit.module, begin(unit.name), with_kwargs=True)
            hooks.after(unit.module, end(unit.name))
        started = _now()
        denoiser(*args, **kwargs)
        seconds = _now() - started
    begins, ends = ({name: when - started for name, when in times.items()} for times in (begins, ends))
    return Forward(one.num_rows, seconds, begins, ends, shapes, calls)


def kind_of(unit: Unit) -> str:
    """Returns the class of a unit's module; units of one class need similar times."""
    return type(unit.module).__name__


def chosen_units(units: Sequence[Unit], context: ReconstructionContext) -> list[Unit]:
    """Returns the units that are measured, at most `_MOST_UNITS`, in that order.

    The order takes the kinds in turn, and from each kind the unit with the fewest weights, a middling one, and units in
    between. In a network that narrows towards its middle, the units with few weights compute the largest images, so
    that the first few separate costs that grow with the rows from costs that grow with the weights. The units with the
    most weights would take as long as many others.
    """
    kinds: dict[str, list[Unit]] = {}
    for unit in sorted(units, key=context.num_weights):
        kinds.setdefault(kind_of(unit), []).append(unit)
    order: list[Unit] = []
    for place in (0.0, 0.5, 0.25, 0.75, 0.125, 0.375, 0.625, 0.875):
        for group in kinds.values():
            unit = group[round(place * (len(group) - 1))]
            order += [] if unit in order else [unit]
    return order[:_MOST_UNITS]


def time_units(
    units: Sequence[Unit], measure: Callable[[Unit], dict[Work, Timed]], limit_s: float
) -> dict[Work, dict[str, Timed]]:
    """Measures at least `_FEWEST_UNITS` units until the time is over; returns times by kind of work and unit."""
    measured: dict[Work, dict[str, Timed]] = {}
    started = time.perf_counter()
    for number, unit in enumerate(units):
        if number >= _FEWEST_UNITS and time.perf_counter() - started > limit_s:
            break
        for work, call in measure(unit).items():
            measured.setdefault(work, {})[unit.name] = call
    return measured


class Stopwatch:
    """Times work on single units, in their place in the network, which is restored afterwards.

    Args:
        context: The network in full precision, and its plan.
        recipe: The recipe's ranges.
        forward: The timed forward, with the calls of all units that are measured.
    """

    def __init__(self, context: ReconstructionContext, recipe: RangeRecipe, forward: Forward) -> None:
        self.network, self.traced, self.plan = context.network, context.traced, context.plan
        self.recipe, self.forward = recipe, forward

    @torch.no_grad()
    def ranging(self, unit: Unit) -> dict[Work, Timed]:
        """Searches for scales and ranges, rounds, freezes, and runs once as deployed."""
        traced, plan = self._part(unit)
        args, kwargs = self.forward.calls[unit.name]
        candidates = self.recipe.num_candidates
        tried = min(candidates, _CANDIDATES) if self.recipe.weight == "search" else candidates
        few = self.recipe.model_copy(update={"num_candidates": tried})
        weights_s, scales = _timed(lambda: search_weight_scales(traced, plan, few))
        activations_s, ranges = _timed(
            lambda: search_activation_ranges(unit.module, traced, plan, self.recipe, [(args, kwargs)])
        )
        counted = self.recipe.model_copy(update={"activation": "minmax"})
        counting_s, _ = _timed(lambda: search_activation_ranges(unit.module, traced, plan, counted, [(args, kwargs)]))
        nearest_s, nearest = _timed(lambda: nearest_params(self.network.float_weight, plan, scales | ranges))
        with self._restored(unit):
            freeze_s, _ = _timed(lambda: freeze_unit(self.network, self.plan, unit, nearest))
            module = self.network.denoiser.get_submodule(unit.name)
            frozen_s, _ = _timed(lambda: module(*args, **kwargs))
        seconds: dict[Work, float] = {
            "weights": weights_s * candidates / tried,
            "activations": counting_s,
            "search": max(0.0, activations_s - counting_s),
            "nearest": nearest_s,
            "freeze": freeze_s,
            "frozen": frozen_s,
        }
        return {work: (self.forward.rows, spent) for work, spent in seconds.items()}

    def learning(self, unit: Unit, hyperparameters: Hyperparameters) -> dict[Work, Timed]:
        """Sets a unit up for learning, evaluates it, and takes steps, on full-precision inputs."""
        rows, batch_size = self.forward.rows, min(self._quick_rows(unit), hyperparameters.batch_size)
        few = hyperparameters.model_copy(update={"iterations": _REPEATS + 1, "batch_size": batch_size})
        with self._restored(unit):
            params, data = self._data(unit, with_layers=few.layer_loss_weight > 0)
            started = _now()
            learner = UnitLearner(self.network, unit, self.plan, params, data, few, seed=0)
            step = make_step(learner, learner.optimization())
            learner.learned.params()
            setup_s = _now() - started
            evaluation_s, _ = _timed(learner.reconstruction_loss)

            def take_step() -> Tensor:
                learner.set_iteration(0)
                return step()

            step_s, _ = _timed(take_step, at_least=2)  # the first step creates the optimizer's state
            learner.batch.close()
        return {"setup": (rows, setup_s), "evaluation": (rows, evaluation_s), "step": (batch_size, step_s)}

    def _quick_rows(self, unit: Unit) -> int:
        """Returns the rows of a quick step, chosen by the unit's forward; rows are repeated if there are fewer."""
        a_row = (self.forward.ends[unit.name] - self.forward.begins[unit.name]) / self.forward.rows
        return max(1, int(_STEP_S / (_STEP_FORWARDS * a_row)))

    def _data(self, unit: Unit, with_layers: bool) -> tuple[dict[str, Tensor], UnitData]:
        """Returns the ranges of a unit, and its inputs and targets: the rows of the forward."""
        traced, plan = self._part(unit)
        (args, kwargs), rows = self.forward.calls[unit.name], self.forward.rows
        minmax = self.recipe.model_copy(update={"weight": "minmax", "activation": "minmax"})
        params = search_ranges(unit.module, traced, plan, minmax, [(args, kwargs)])
        cache = RowCache(Path(), 2**62, self.network.device)  # all of it in memory
        form = self.forward.shapes[unit.name].form(unit.name, rows)
        call = capture_call(unit, form, args, kwargs, rows, cache)
        return params, UnitData(call, call, layer_targets(self.network, unit, call, rows, cache) if with_layers else {})

    def _part(self, unit: Unit) -> tuple[Trace, QuantizationPlan]:
        """Returns the trace and the plan of one unit."""
        traced = Trace(
            layers=[layer for layer in self.traced.layers if layer.name in unit.layers],
            attentions={name: self.traced.attentions[name] for name in unit.attentions},
        )
        layers = {name: self.plan.layers[name] for name in unit.layers}
        attentions = {name: self.plan.attentions[name] for name in unit.attentions if name in self.plan.attentions}
        return traced, QuantizationPlan(layers=layers, attentions=attentions)

    @contextmanager
    def _restored(self, unit: Unit) -> Iterator[None]:
        """Restores the layers and processors of a unit at the end."""
        try:
            yield
        finally:
            self.network.restore(unit.layers, unit.attentions)


def _timed(work: Callable[[], T], at_least: int = 1) -> tuple[float, T]:
    """Returns the seconds of some work (the shortest of several times if it is quick), and its result."""
    least, spent = float("inf"), 0.0
    for number in range(_REPEATS):
        started = _now()
        result = work()
        least, spent = min(least, _now() - started), spent + _now() - started
        if spent > _QUICK_S and number + 1 >= at_least:
            break
    return least, result


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
