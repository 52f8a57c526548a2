"""Chooses the inputs that a reconstruction leaves in float, if its recipe has a share of multiplications for them."""

from __future__ import annotations

from dataclasses import replace

from edadm_cli.calibrate.float_inputs import find_float_inputs, with_float_inputs
from edadm_cli.models.families import Call
from edadm_cli.processes import Processes
from edadm_cli.recipe import RangeRecipe
from edadm_cli.reconstruct.context import ReconstructionContext

_SAMPLES, _ROWS = 128, 8  # samples that are measured, and rows per backward pass


def plan_float_inputs(
    context: ReconstructionContext, recipe: RangeRecipe, seed: int, processes: Processes
) -> ReconstructionContext:
    """Returns the context whose plan leaves the most harmful inputs in float, within the recipe's share.

    The main process measures and decides for all: sums on a GPU may differ in their last bits.

    Args:
        context: The denoiser and its plan.
        recipe: The share, and how ranges are searched.
        seed: The seed of the measurement.
        processes: The processes that share the work.
    """
    if not recipe.float_input_share:
        return context
    layers = processes.share(_find(context, recipe, seed) if processes.is_main else None)
    return replace(context, plan=with_float_inputs(context.plan, layers))


def _find(context: ReconstructionContext, recipe: RangeRecipe, seed: int) -> list[str]:
    batches, network = context.batches, context.network
    places = batches.of_every_step(_SAMPLES)

    def calls(size: int) -> list[Call]:
        return [batches.call(places[start : start + size]) for start in range(0, len(places), size)]

    few = max(1, _ROWS // batches.calibration.branches)
    with network.full_precision():
        return find_float_inputs(
            network.denoiser, context.traced, context.plan, recipe, calls(batches.batch_size), calls(few), seed
        )
