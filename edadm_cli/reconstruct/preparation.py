"""Prepares a reconstruction: loads a denoiser with its calibration set, and plans its layers and units."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import nn

from edadm_cli.artifacts import Sensitivity
from edadm_cli.calibrate.bit_budget import layer_costs, spend_budget
from edadm_cli.calibrate.planning import layer_rule, plan_network
from edadm_cli.config import ReconstructConfig
from edadm_cli.errors import UsageError
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.denoiser_calls.calibration import CalibrationSet
from edadm_cli.models.repeatable import repeatable_convolutions
from edadm_cli.models.stored import is_stored
from edadm_cli.models.units import Trace, Unit, trace, units
from edadm_cli.quant.plan import QuantizationPlan, name_within
from edadm_cli.recipe import Recipe
from edadm_cli.reconstruct.batches import Batches
from edadm_cli.reconstruct.context import ReconstructionContext
from edadm_cli.reconstruct.network import SwitchableNetwork
from edadm_cli.reconstruct.task import Task


def prepare(
    task: Task, place: str = "", note: Callable[[str], None] = lambda _: None, plan: QuantizationPlan | None = None
) -> ReconstructionContext:
    """Loads a denoiser and plans its layers and units.

    Args:
        task: What is reconstructed.
        place: Which denoiser; see `CollectedRun.places`.
        note: Called with a sentence on where its weights are.
        plan: The bits of its layers, if they are decided already.
    """
    config = task.config
    denoiser, traced, batches = load_traced(task, place, note)
    if plan is None:
        plan = plan_network(traced, _recipe(task, place, denoiser, traced), config.bits)
    network = SwitchableNetwork(denoiser, list(plan.layers), list(plan.attentions))
    granularity: Literal["block", "layer"] = "layer" if config.recipe.learn.granularity == "layer" else "block"
    all_units = units(denoiser, traced, set(plan.layers), granularity)
    return ReconstructionContext(network, traced, plan, all_units, _learning(all_units, config), batches)


def load_traced(
    task: Task, place: str, note: Callable[[str], None] = lambda _: None
) -> tuple[nn.Module, Trace, Batches]:
    """Loads a denoiser with its calibration set, and traces a call of it.

    Args:
        task: What is reconstructed.
        place: Which denoiser; see `CollectedRun.places`.
        note: Called with a sentence on where its weights are.

    Raises:
        UsageError: The recipe needs all weights in memory, and they stay on disk.
    """
    config = task.config
    denoiser = CollectedRun.open(task.run).load_denoiser(task.device, config.weights, place, note)
    if any(map(is_stored, denoiser.modules())):
        _require_no_backward_pass(config.recipe)
    batches = Batches(CalibrationSet.load(task.selection.within(place)), task.batch_size, task.device)
    (args, kwargs), *_ = iter(batches.few(1))
    return denoiser, trace(denoiser, args, kwargs), batches


def _require_no_backward_pass(recipe: Recipe) -> None:
    """Refuses a recipe that computes gradients through the whole denoiser, whose weights stay on disk."""
    work = (
        (
            "float_input_share",
            "ranges",
            "measures which inputs stay in floating point",
            recipe.ranges.float_input_share,
        ),
        ("network_iterations", "learn", "learns all units together", recipe.learn.network_iterations),
    )
    for field, table, purpose, value in work:
        if value:
            raise UsageError(
                f"The recipe '{recipe.name}' {purpose} by a backward pass, which needs all weights in memory, but here"
                " they stay on disk.",
                hint=f"--weights memory, --recipe default, or {field} = 0 in the recipe's [{table}]",
            )


def _recipe(task: Task, place: str, denoiser: nn.Module, traced: Trace) -> Recipe:
    """Returns the recipe of a denoiser; if bits are assigned by sensitivity, each layer's rule gives it its bits.

    Args:
        task: What is reconstructed.
        place: Which denoiser; see `CollectedRun.places`.
        denoiser: The denoiser in full precision.
        traced: Its trace.
    """
    recipe = task.config.recipe
    if task.sensitivity is None:
        return recipe
    if not task.assigned_bits:
        # the solver stops after a minute, so that slow processes may find other bits
        bits = _assign(task, place, denoiser, traced) if task.processes.is_main else None
        task.assigned_bits.update(task.processes.share(bits) or {})
    names = [layer.name for layer in traced.layers if name_within(place, layer.name) in task.assigned_bits]
    rules = [
        layer_rule(name, recipe).model_copy(
            update={"pattern": name, "weight_bits": task.assigned_bits[name_within(place, name)]}
        )
        for name in names
    ]
    return recipe.model_copy(update={"layers": (*recipe.layers, *rules)})


def _assign(task: Task, place: str, denoiser: nn.Module, traced: Trace) -> dict[str, int]:
    """Returns the weight bits of each layer of all denoisers; those that are not at hand are loaded for it."""
    assert task.sensitivity is not None
    measured, config, costs = Sensitivity.load(task.sensitivity), task.config, []
    for other in CollectedRun.open(task.run).places:
        each = (denoiser, traced) if other == place else load_traced(task, other)[:2]
        costs.append(layer_costs(measured, config.bits, config.recipe, *each, other))
    return spend_budget(config.bits, costs)


def _learning(all_units: list[Unit], config: ReconstructConfig) -> list[Unit]:
    """Returns the units that learn."""
    for pattern in config.units:
        if not any(fnmatchcase(unit.name, pattern) for unit in all_units):
            raise UsageError(
                f"The pattern '{pattern}' of --units matches none of the {len(all_units)} units, such as"
                f" '{all_units[len(all_units) // 2].name}'."
            )
    if config.recipe.learn.granularity == "none":
        return []
    return [unit for unit in all_units if not config.units or any(fnmatchcase(unit.name, p) for p in config.units)]


@contextmanager
def arithmetic(task: Task) -> Iterator[None]:
    """Makes convolutions deterministic while entered, and lets products use TF32 if the task asks for it."""
    matmul, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolutions.allow_tf32
    matmul.allow_tf32 = convolutions.allow_tf32 = task.matmul == "tf32"
    try:
        with repeatable_convolutions():
            yield
    finally:
        matmul.allow_tf32, convolutions.allow_tf32 = before
