"""The inputs that a reconstruction leaves in floating point, as far as its recipe spends multiplications on them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edadm_cli.calibrate.float_inputs import plan_float_inputs
from edadm_cli.recipe import RangeRecipe
from edadm_cli.reconstruct.context import ReconstructionContext

_SAMPLES, _ROWS = 128, 8  # samples that are measured, and rows per backward pass


def with_float_inputs(context: ReconstructionContext, recipe: RangeRecipe, seed: int) -> ReconstructionContext:
    """Returns the context whose plan leaves those inputs in floating point that the recipe's share is best spent on.

    Args:
        context: The denoiser and its plan.
        recipe: The share, and how ranges are searched.
        seed: Seed of the measurement.
    """
    if not recipe.float_input_share:
        return context
    batches, network = context.batches, context.network
    places = batches.of_every_step(_SAMPLES)

    def calls(size: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [batches.call(places[start : start + size]) for start in range(0, len(places), size)]

    few = max(1, _ROWS // batches.calibration.branches)
    with network.full_precision():
        plan = plan_float_inputs(
            network.denoiser, context.traced, context.plan, recipe, calls(batches.batch_size), calls(few), seed
        )
    return replace(context, plan=plan)
