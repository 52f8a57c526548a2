"""Builds the parameters of every denoiser: searches ranges, learns rounding and scales, and commits the artifact."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from edadm_cli.artifacts import Build, UnitLosses, load_tensors, save_tensors
from edadm_cli.artifacts.quantization import PARAMS_FILE
from edadm_cli.calibrate.gptq import gptq_params
from edadm_cli.calibrate.nearest import nearest_params
from edadm_cli.calibrate.ranges import search_ranges
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.denoiser_calls.trajectories import samples_of_all_steps
from edadm_cli.progress import Reporter
from edadm_cli.reconstruct.batches import Batches
from edadm_cli.reconstruct.blocks import BlockReconstruction, Workspace
from edadm_cli.reconstruct.checkpoint import UNITS_FOLDER, UnitCheckpoints
from edadm_cli.reconstruct.context import ReconstructionContext
from edadm_cli.reconstruct.memory import rows_budget
from edadm_cli.reconstruct.planned import planned_context
from edadm_cli.reconstruct.preparation import arithmetic
from edadm_cli.reconstruct.rows import CACHE_FOLDER, RowCache
from edadm_cli.reconstruct.step_effects import measured_effects
from edadm_cli.reconstruct.summary import no_blocks, quantized_names, report_gaps, summary
from edadm_cli.reconstruct.task import Task
from edadm_cli.reconstruct.unit_data import UnitResult

_RANGES_FILE = "ranges.safetensors"


def build_params(task: Task, build: Build, reporter: Reporter) -> None:
    """Reconstructs all denoisers of a pipeline into the folder of a build, and commits it.

    Raises:
        InputError: The model is not the one that was collected from.
        UsageError: A pattern of the recipe matches no layer, or one of `units` matches no unit.
        EdadmError: A planned layer was not quantized.
    """
    started, processes = time.monotonic(), task.processes
    passes: dict[str, int] = {}
    places = CollectedRun.open(task.run).places
    with arithmetic(task):
        for place in places:
            for kind, number in _build_denoiser(task, place, build.path / place, reporter).items():
                passes[kind] = passes.get(kind, 0) + number
    processes.wait()  # the others may still read what is discarded now
    if processes.is_main:
        scratch = (UNITS_FOLDER, CACHE_FOLDER, _RANGES_FILE)
        build.discard(str(Path(place, name)) for place in places for name in scratch)
        facts = {
            "device": str(task.device),
            "seconds": round(time.monotonic() - started, 3),
            "processes": processes.count,
            "matmul": task.matmul,
            "passes": passes,
        }
        build.commit(environment=facts)
    processes.wait()


def _build_denoiser(task: Task, place: str, folder: Path, reporter: Reporter) -> dict[str, int]:
    """Reconstructs one denoiser into its folder, and returns how often the calibration set went through it."""
    if task.processes.is_main:
        folder.mkdir(exist_ok=True)
    task.processes.wait()
    note = reporter.warn if task.processes.is_main else lambda _: None
    context = planned_context(task, place, folder, note)
    warnings = no_blocks(task, context)
    for warning in warnings if task.processes.is_main else ():
        reporter.warn(warning)
    result = _reconstruct(task, place, context, folder, reporter)
    quantized = quantized_names(context.plan, result.params)
    if task.processes.is_main:
        save_tensors(folder / PARAMS_FILE, result.params)
        summary(context, result.units, result.together, len(quantized), warnings).save(folder)
    return result.passes


@dataclass(frozen=True)
class Reconstructed:
    """A denoiser that is reconstructed.

    Attributes:
        params: The parameters of all layers.
        units: The result of each unit that learned, by name.
        passes: How often the calibration set went through the denoiser, by kind.
        together: The losses of the prediction where all units learned together as well.
    """

    params: dict[str, Tensor]
    units: dict[str, UnitResult] = field(default_factory=dict)
    passes: dict[str, int] = field(default_factory=dict)
    together: UnitLosses | None = None


def _reconstruct(
    task: Task, place: str, context: ReconstructionContext, folder: Path, reporter: Reporter
) -> Reconstructed:
    """Searches ranges, then rounds or learns."""
    ranges = _ranges(task, context, folder, reporter)
    if not context.learning:
        return Reconstructed(_rounded(task, context, ranges))
    budget = task.processes.share(rows_budget(task.config.memory_budget_mib, context, task.hyperparameters))
    cache = RowCache(folder, budget, task.device, shared=task.processes.count > 1)
    reconstruction = BlockReconstruction(
        context.network,
        context.plan,
        ranges,
        context.batches,
        task.hyperparameters,
        task.config.seed,
        Workspace(cache, UnitCheckpoints(folder), task.processes),
    )
    with reporter.task("reconstruct", len(context.units)) as advance:
        results = reconstruction.run(context.units, advance, {unit.name for unit in context.learning})
    report_gaps(results, task.hyperparameters, reporter)
    together = _learn_together(task, place, context, reconstruction, reporter)
    return Reconstructed(reconstruction.params, results, reconstruction.passes, together)


def _learn_together(
    task: Task, place: str, context: ReconstructionContext, reconstruction: BlockReconstruction, reporter: Reporter
) -> UnitLosses | None:
    """Learns all units together if the recipe says so; returns the losses of the prediction."""
    iterations = task.hyperparameters.network_iterations
    if not iterations:
        return None
    batches = _of_all_steps(task, place, reporter) or context.batches
    weighted = task.hyperparameters.network_step_weights == "effect"
    effects = measured_effects(task, place, context.network.denoiser, reporter) if weighted else None
    with reporter.task("learn all units together", iterations) as advance:
        return reconstruction.learn_together(context.learning, len(context.units), batches, advance, effects)


def _of_all_steps(task: Task, place: str, reporter: Reporter) -> Batches | None:
    """Returns samples of all sampler steps alike; `None` if the steps of trajectories do not suffice to call.

    A calibration set may lack whole steps, whose errors nothing would keep small while all units learn together.
    """
    collected, generator = CollectedRun.open(task.run), torch.Generator().manual_seed(task.config.seed)
    samples = samples_of_all_steps(
        collected.artifact.within(place),
        task.hyperparameters.network_samples,
        collected.num_trajectories,
        generator,
        reporter,
    )
    return None if samples is None else Batches(samples, task.batch_size, task.device)


def _rounded(task: Task, context: ReconstructionContext, ranges: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the parameters where nothing is learned."""
    network, plan = context.network, context.plan
    if task.config.recipe.rounding == "nearest":
        return nearest_params(network.float_weight, plan, ranges)
    with network.full_precision():
        return gptq_params(network.denoiser, context.traced, plan, ranges, context.batches)


def _ranges(task: Task, context: ReconstructionContext, folder: Path, reporter: Reporter) -> dict[str, Tensor]:
    """Returns the initial ranges, which the main process searches: batches are merged in their order."""
    path, network = folder / _RANGES_FILE, context.network
    if task.processes.is_main and not path.is_file():
        with reporter.task("search ranges", len(context.batches)) as advance, network.full_precision():
            recipe, plan, batches = task.config.recipe, context.plan, context.batches
            params = search_ranges(
                network.denoiser, context.traced, plan, recipe.ranges, batches, advance, recipe.transforms
            )
        save_tensors(path, params)
    task.processes.wait()
    return load_tensors(path)
