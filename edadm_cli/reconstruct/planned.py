"""Plans a denoiser once per reconstruction: a run that was killed goes on with the plan that it had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edadm_cli.artifacts import read_model
from edadm_cli.artifacts.quantization import PLAN_FILE, save_plan
from edadm_cli.quant.plan import QuantizationPlan
from edadm_cli.reconstruct.context import ReconstructionContext
from edadm_cli.reconstruct.float_inputs import plan_float_inputs
from edadm_cli.reconstruct.preparation import prepare
from edadm_cli.reconstruct.task import Task


def planned_context(task: Task, place: str, folder: Path, note: Callable[[str], None]) -> ReconstructionContext:
    """Loads a denoiser with its plan, which the main process stores in the folder before anything is learned.

    What is measured for a plan may come out otherwise in a second run: sums on a GPU differ in their last bits, and the
    solver of `auto:` bits stops after a minute. The finished units of a killed run belong to the plan that is stored.

    Args:
        task: What is reconstructed.
        place: Which denoiser; see `CollectedRun.places`.
        folder: The folder of its results.
        note: Called with a sentence on where its weights are.

    Raises:
        InputError: The stored plan is damaged.
    """
    processes = task.processes
    stored = processes.share(_read(folder) if processes.is_main else None)
    if stored is not None:
        return prepare(task, place, note, QuantizationPlan.model_validate(stored))
    context = plan_float_inputs(prepare(task, place, note), task.config.recipe.ranges, task.config.seed, processes)
    if processes.is_main:
        save_plan(folder, context.plan)
    return context


def _read(folder: Path) -> dict[str, object] | None:
    """Returns the stored plan as JSON values; `None` if there is none."""
    path = folder / PLAN_FILE
    return read_model(path, QuantizationPlan).model_dump(mode="json") if path.is_file() else None
