"""The summary of a reconstruction: coverage, losses, and what the user is warned of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from edadm_cli.artifacts import Coverage, Loss, UnitLosses, UnitRow, Units
from edadm_cli.calibrate.planning import count
from edadm_cli.errors import EdadmError
from edadm_cli.progress import Reporter
from edadm_cli.quant.plan import QuantizationPlan
from edadm_cli.reconstruct.context import ReconstructionContext
from edadm_cli.reconstruct.hyperparameters import Hyperparameters
from edadm_cli.reconstruct.task import Task
from edadm_cli.reconstruct.unit_data import UnitResult

_LARGEST_GAP = 1.1  # largest ratio of the loss with rounded h to the loss before rounding that gives no warning


def no_blocks(task: Task, context: ReconstructionContext) -> list[str]:
    """Returns a warning if blocks are to be reconstructed and the denoiser has none."""
    learns_blocks = task.config.recipe.learn.granularity == "block"
    if not learns_blocks or any(unit.kind != "layer" for unit in context.units):
        return []
    return [
        f"No block was found in {type(context.network.denoiser).__name__}, so each of its {len(context.units)} layers "
        "is reconstructed by itself: errors that layers make together are not learned, and the quality may be lower. "
        "A family names the blocks: docs/models.md, 'Describe a denoiser'."
    ]


def quantized_names(plan: QuantizationPlan, params: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of the planned layers and attentions that have parameters; raises if one has none."""
    keys = {name: f"{layer.part_names(name)[-1]}.weight_int" for name, layer in plan.layers.items()} | {
        name: f"{name}.q_scale" for name in plan.attentions
    }
    missing = [name for name, key in keys.items() if key not in params]
    if missing:
        raise EdadmError(f"{len(missing)} planned layers were not quantized: {', '.join(missing)}.")
    return list(keys)


def summary(
    context: ReconstructionContext,
    results: Mapping[str, UnitResult],
    together: UnitLosses | None,
    num_quantized: int,
    warnings: Sequence[str],
) -> Units:
    """Returns the contents of `units.json` of one denoiser."""
    rows = []
    for unit in context.units:
        result = results.get(unit.name)
        learned = {"loss_before": None, "loss_after": None} if result is None else dict(result.losses)
        rows.append(UnitRow(name=unit.name, kind=unit.kind, layers=unit.layers, **learned))
    planned = len(context.plan.layers) + len(context.plan.attentions)
    return Units(
        units=tuple(rows),
        coverage=Coverage(planned=planned, quantized=num_quantized, kept=len(context.plan.kept)),
        by_kind=count(context.plan, context.traced),
        loss=_loss(context, results),
        together=together,
        warnings=tuple(warnings),
    )


def _loss(context: ReconstructionContext, results: Mapping[str, UnitResult]) -> Loss:
    """Returns the losses summed over the units, and the share of all learned weights that were undecided."""
    if not results:
        return Loss()
    sizes = {unit.name: context.num_weights(unit) for unit in context.units if unit.name in results}
    undecided = sum(sizes[name] * (result.losses.undecided or 0.0) for name, result in results.items())
    return Loss(
        first=sum(result.losses.loss_before for result in results.values()),
        last=sum(result.losses.loss_after for result in results.values()),
        soft=sum(result.losses.loss_soft or 0.0 for result in results.values()),
        undecided=undecided / sum(sizes.values()),
    )


def report_gaps(results: Mapping[str, UnitResult], hyperparameters: Hyperparameters, reporter: Reporter) -> None:
    """Warns if rounding h at the end raised the loss, and names the units that keep their nearest rounding."""
    if not hyperparameters.iterations:
        return
    losses = {name: result.losses for name, result in results.items()}
    hard = sum(each.loss_after for each in losses.values())
    soft = sum(each.loss_soft or 0.0 for each in losses.values())
    if hard > _LARGEST_GAP * soft:
        undecided = [name for name, each in losses.items() if each.loss_after > _LARGEST_GAP * (each.loss_soft or 0)]
        reporter.warn(
            f"Rounding was not decided when learning ended: the summed loss of the units is {hard:.4g} as deployed and"
            f" {soft:.4g} before h was rounded; {len(undecided)} of {len(results)} units are more than 10% above, such"
            f" as '{undecided[0]}'. Set rounding_sharpness = 20 in the recipe."
        )
    for name, each in losses.items():
        if each.is_nearest:
            reporter.note(f"Learning did not improve '{name}', which keeps its weights rounded to nearest.")
