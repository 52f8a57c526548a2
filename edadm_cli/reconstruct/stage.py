"""`edadm reconstruct`: learns quantization parameters from a calibration set."""

from __future__ import annotations

import time
from pathlib import Path

from torch import Tensor

from edadm_cli.artifacts import (
    Build,
    BuildSpec,
    ReconstructRecord,
    RunFolder,
    Units,
    load_tensors,
    save_tensors,
    shared_keys,
)
from edadm_cli.artifacts.quantization import PARAMS_FILE
from edadm_cli.calibrate.gptq import gptq_params
from edadm_cli.calibrate.nearest import nearest_params
from edadm_cli.calibrate.ranges import search_ranges
from edadm_cli.config import ReconstructConfig
from edadm_cli.models.collected import CollectedRun
from edadm_cli.processes import ALONE, join
from edadm_cli.progress import Reporter, SilentReporter
from edadm_cli.reconstruct.blocks import BlockReconstruction, Workspace
from edadm_cli.reconstruct.checkpoint import UNITS_FOLDER, UnitCheckpoints
from edadm_cli.reconstruct.context import ReconstructionContext
from edadm_cli.reconstruct.memory import rows_budget
from edadm_cli.reconstruct.planned import planned_context
from edadm_cli.reconstruct.rows import CACHE_FOLDER, RowCache
from edadm_cli.reconstruct.summary import no_blocks, quantized_names, report_gaps, summary, total_coverage, total_loss
from edadm_cli.reconstruct.task import Task, arithmetic, resolve_task
from edadm_cli.reconstruct.unit_data import UnitResult

_RANGES_FILE = "ranges.safetensors"


def run(
    config: ReconstructConfig, run_folder: RunFolder, *, force: bool = False, reporter: Reporter | None = None
) -> ReconstructRecord:
    """Searches ranges and learns rounding and scales, unit by unit.

    Raises:
        InputError: There is no calibration set, or the model is not the one that it was collected from.
        UsageError: A pattern of the recipe matches no layer, a pattern of `units` matches no unit, or there are more
            processes than rows per step.
        EdadmError: A planned layer was not quantized.
    """
    started, reporter = time.monotonic(), reporter or SilentReporter()
    processes = join(config.device)
    with processes.together():
        task = resolve_task(config, run_folder, processes)
        with run_folder.build(task.build_spec(), force, processes) as build:
            is_done = build.up_to_date
            if not is_done:
                _build(task, build, reporter)
            artifact = build.finished()
    parts = [Units.load(artifact.within(place)) for place in CollectedRun.open(run_folder).places]
    return ReconstructRecord(
        **shared_keys(run_folder.root, artifact, up_to_date=is_done, started=started, warnings=reporter.warnings),
        bits=str(config.bits),
        recipe=config.recipe.name,
        units=sum(len(part.units) for part in parts),
        coverage=total_coverage(parts),
        loss=total_loss(parts),
    )


def build_spec(config: ReconstructConfig, run_folder: RunFolder) -> BuildSpec:
    """Returns the description of the artifact that `run` would build, without loading the model."""
    return resolve_task(config, run_folder, ALONE).build_spec()


def artifact_name(config: ReconstructConfig) -> str:
    """Returns the artifact's name within its kind."""
    return config.name


def _build(task: Task, build: Build, reporter: Reporter) -> None:
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
    params, results, passes = _reconstruct(task, context, folder, reporter)
    quantized = quantized_names(context.plan, params)
    if task.processes.is_main:
        save_tensors(folder / PARAMS_FILE, params)
        summary(context, results, len(quantized), warnings).save(folder)
    return passes


def _reconstruct(
    task: Task, context: ReconstructionContext, folder: Path, reporter: Reporter
) -> tuple[dict[str, Tensor], dict[str, UnitResult], dict[str, int]]:
    """Returns the parameters, the result of each unit, and the number of passes of the calibration set by kind."""
    ranges = _ranges(task, context, folder, reporter)
    if not context.learning:
        return _rounded(task, context, ranges), {}, {}
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
    return reconstruction.params, results, reconstruction.passes


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
