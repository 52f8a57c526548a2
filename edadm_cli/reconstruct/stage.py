"""`edadm reconstruct`: learns quantization parameters from a calibration set."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from edadm_cli.artifacts import (
    Artifact,
    Build,
    BuildSpec,
    Coverage,
    Loss,
    ReconstructRecord,
    RunFolder,
    Sensitivity,
    UnitRow,
    Units,
    load_tensors,
    save_tensors,
    shared_keys,
)
from edadm_cli.artifacts.quantization import PARAMS_FILE, save_plan
from edadm_cli.calibrate.bit_budget import spend_budget
from edadm_cli.calibrate.gptq import gptq_params
from edadm_cli.calibrate.nearest import nearest_params
from edadm_cli.calibrate.planning import count, plan_network
from edadm_cli.calibrate.ranges import search_ranges
from edadm_cli.config import ReconstructConfig
from edadm_cli.errors import EdadmError, UsageError
from edadm_cli.models.calibration import CalibrationSet
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.loading import resolve_device
from edadm_cli.models.registry import known_models
from edadm_cli.models.stored import is_stored
from edadm_cli.models.units import Trace, Unit, trace, units
from edadm_cli.processes import ALONE, Processes, join
from edadm_cli.progress import Reporter, SilentReporter
from edadm_cli.quant.plan import QuantizationPlan
from edadm_cli.recipe import LayerRule, Recipe
from edadm_cli.reconstruct.batches import Batches
from edadm_cli.reconstruct.blocks import BlockReconstruction, Workspace
from edadm_cli.reconstruct.checkpoint import UNITS_FOLDER, UnitCheckpoints
from edadm_cli.reconstruct.context import ReconstructionContext
from edadm_cli.reconstruct.float_inputs import with_float_inputs
from edadm_cli.reconstruct.hyperparameters import Hyperparameters, resolve
from edadm_cli.reconstruct.memory import rows_budget
from edadm_cli.reconstruct.network import SwitchableNetwork
from edadm_cli.reconstruct.optimization import repeatable_convolutions
from edadm_cli.reconstruct.rows import CACHE_FOLDER, RowCache
from edadm_cli.reconstruct.unit_data import UnitResult

_RANGES_FILE = "ranges.safetensors"
_LARGEST_GAP = 1.1  # largest ratio of the loss with rounded h to the loss before rounding that gives no warning


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
        coverage=_total_coverage(parts),
        loss=_total_loss(parts),
    )


def build_spec(config: ReconstructConfig, run_folder: RunFolder) -> BuildSpec:
    """Returns the description of the artifact that `run` would build, without loading the model."""
    return resolve_task(config, run_folder, ALONE).build_spec()


def artifact_name(config: ReconstructConfig) -> str:
    """Returns the artifact's name within its kind."""
    return config.name


@dataclass(frozen=True)
class _Task:
    """A configuration whose open choices are all decided."""

    config: ReconstructConfig
    run: RunFolder
    selection: Artifact
    sensitivity: Artifact | None
    batch_size: int
    hyperparameters: Hyperparameters
    device: torch.device
    processes: Processes

    def build_spec(self) -> BuildSpec:
        config = self.config
        fields = {**config.identity_fields(), "batch_size": self.batch_size}
        fields["recipe"] = {k: v for k, v in fields["recipe"].items() if k not in ("description", "collect", "select")}
        fields.pop("matmul", None)
        if self.matmul != _usual_matmul(self.device):  # what a device usually does is not part of the identity
            fields["matmul"] = self.matmul
        fields["hyperparameters"] = self.hyperparameters.identity_fields()
        model = self.selection.manifest.model
        parents = (self.selection,) if self.sensitivity is None else (self.selection, self.sensitivity)
        return BuildSpec("reconstruct", str(config.bits), fields, config.seed, parents, model)

    @property
    def matmul(self) -> str:
        """How float32 numbers are multiplied: `float32` or `tf32`."""
        return self.config.matmul or _usual_matmul(self.device)

    def recipe(self, denoiser: nn.Module, traced: Trace) -> Recipe:
        """Returns the recipe; if bits are assigned by sensitivity, it has a rule for each layer."""
        recipe = self.config.recipe
        if self.sensitivity is None:
            return recipe
        bits = spend_budget(Sensitivity.load(self.sensitivity), self.config.bits, denoiser, traced)
        rules = tuple(LayerRule(pattern=name, weight_bits=number) for name, number in bits.items())
        return recipe.model_copy(update={"layers": (*rules, *recipe.layers)})


def _usual_matmul(device: torch.device) -> Literal["float32", "tf32"]:
    """Returns how float32 numbers are multiplied where nothing is asked for."""
    return "tf32" if device.type == "cuda" else "float32"


def resolve_task(config: ReconstructConfig, run: RunFolder, processes: Processes) -> _Task:
    """Decides what the configuration leaves open, without loading the model."""
    selection = run.open("select")
    device = resolve_device(processes.device_name(config.device))
    if config.matmul == "tf32" and device.type != "cuda":
        raise UsageError("--matmul tf32 needs an NVIDIA GPU, but this reconstruction runs on the CPU.")
    entry = known_models().get(selection.manifest.model.id)
    hyperparameters = resolve(config.recipe.learn, entry.paper if entry else None, config.bits)
    if hyperparameters.batch_size < processes.count:
        raise UsageError(
            f"A step takes {hyperparameters.batch_size} rows, which {processes.count} processes cannot share.",
            hint="a larger batch_size in the recipe, or fewer processes",
        )
    batch_size = config.batch_size
    if batch_size is None:
        batch_size = CollectedRun.open(run).entry.batch_size
    sensitivity = run.open("sensitivity") if config.bits.is_mixed else None
    return _Task(config, run, selection, sensitivity, batch_size, hyperparameters, device, processes)


def prepare(task: _Task, place: str = "", note: Callable[[str], None] = lambda _: None) -> ReconstructionContext:
    """Loads a denoiser and plans its layers and units.

    Args:
        task: What is reconstructed.
        place: Which denoiser; see `CollectedRun.places`.
        note: Called with a sentence on where its weights are.
    """
    config = task.config
    denoiser = CollectedRun.open(task.run).load_denoiser(task.device, config.weights, place, note)
    if config.recipe.ranges.float_input_share and any(map(is_stored, denoiser.modules())):
        raise UsageError(
            f"The recipe '{config.recipe.name}' measures which inputs stay in floating point by a backward pass, which"
            " needs all weights in memory, but here they stay on disk.",
            hint="--weights memory, --recipe default, or float_input_share = 0 in the recipe's [ranges]",
        )
    batches = Batches(CalibrationSet.load(task.selection.within(place)), task.batch_size, task.device)
    (args, kwargs), *_ = iter(batches.few(1))
    traced = trace(denoiser, args, kwargs)
    plan = plan_network(traced, task.recipe(denoiser, traced), config.bits)
    network = SwitchableNetwork(denoiser, list(plan.layers), list(plan.attentions))
    granularity: Literal["block", "layer"] = "layer" if config.recipe.learn.granularity == "layer" else "block"
    all_units = units(denoiser, traced, set(plan.layers), granularity)
    return ReconstructionContext(network, traced, plan, all_units, _learning(all_units, config), batches)


def _no_blocks(task: _Task, context: ReconstructionContext) -> list[str]:
    """Returns a warning if blocks are to be reconstructed and the denoiser has none."""
    learns_blocks = task.config.recipe.learn.granularity == "block"
    if not learns_blocks or any(unit.kind != "layer" for unit in context.units):
        return []
    return [
        f"No block was found in {type(context.network.denoiser).__name__}, so each of its {len(context.units)} layers "
        "is reconstructed by itself: errors that layers make together are not learned, and the quality may be lower. "
        "A family names the blocks: docs/models.md, 'Describe a denoiser'."
    ]


def _learning(all_units: list[Unit], config: ReconstructConfig) -> list[Unit]:
    """Returns the units that learn."""
    if config.recipe.learn.granularity == "none":
        return []
    for pattern in config.units:
        if not any(fnmatchcase(unit.name, pattern) for unit in all_units):
            raise UsageError(
                f"The pattern '{pattern}' of --units matches none of the {len(all_units)} units, such as"
                f" '{all_units[len(all_units) // 2].name}'."
            )
    return [unit for unit in all_units if not config.units or any(fnmatchcase(unit.name, p) for p in config.units)]


@contextmanager
def arithmetic(task: _Task) -> Iterator[None]:
    """Makes convolutions deterministic while entered, and lets products use TF32 if the task asks for it."""
    matmul, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolutions.allow_tf32
    matmul.allow_tf32 = convolutions.allow_tf32 = task.matmul == "tf32"
    try:
        with repeatable_convolutions():
            yield
    finally:
        matmul.allow_tf32, convolutions.allow_tf32 = before


def _build(task: _Task, build: Build, reporter: Reporter) -> None:
    started, processes = time.monotonic(), task.processes
    passes: dict[str, int] = {}
    places = CollectedRun.open(task.run).places
    with arithmetic(task):
        for place in places:
            for kind, number in _build_denoiser(task, place, build.path / place, reporter).items():
                passes[kind] = passes.get(kind, 0) + number
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


def _build_denoiser(task: _Task, place: str, folder: Path, reporter: Reporter) -> dict[str, int]:
    """Reconstructs one denoiser into its folder, and returns how often the calibration set went through it."""
    if task.processes.is_main:
        folder.mkdir(exist_ok=True)
    task.processes.wait()
    note = reporter.warn if task.processes.is_main else lambda _: None
    context = with_float_inputs(prepare(task, place, note), task.config.recipe.ranges, task.config.seed)
    warnings = _no_blocks(task, context)
    for warning in warnings if task.processes.is_main else ():
        reporter.warn(warning)
    params, results, passes = _reconstruct(task, context, folder, reporter)
    quantized = _quantized(context.plan, params)
    if task.processes.is_main:
        save_tensors(folder / PARAMS_FILE, params)
        save_plan(folder, context.plan)
        _summary(context, results, len(quantized), warnings).save(folder)
    return passes


def _reconstruct(
    task: _Task, context: ReconstructionContext, folder: Path, reporter: Reporter
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
    _report_gaps(results, task.hyperparameters, reporter)
    return reconstruction.params, results, reconstruction.passes


def _rounded(task: _Task, context: ReconstructionContext, ranges: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the parameters where nothing is learned."""
    network, plan = context.network, context.plan
    if task.config.recipe.rounding == "nearest":
        return nearest_params(network.float_weight, plan, ranges)
    with network.full_precision():
        return gptq_params(network.denoiser, context.traced, plan, ranges, context.batches)


def _ranges(task: _Task, context: ReconstructionContext, folder: Path, reporter: Reporter) -> dict[str, Tensor]:
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


def _quantized(plan: QuantizationPlan, params: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of the planned layers and attentions that have parameters; raises if one has none."""
    keys = {name: f"{layer.part_names(name)[-1]}.weight_int" for name, layer in plan.layers.items()} | {
        name: f"{name}.q_scale" for name in plan.attentions
    }
    missing = [name for name, key in keys.items() if key not in params]
    if missing:
        raise EdadmError(f"{len(missing)} planned layers were not quantized: {', '.join(missing)}.")
    return list(keys)


def _summary(
    context: ReconstructionContext, results: Mapping[str, UnitResult], num_quantized: int, warnings: Sequence[str]
) -> Units:
    rows = []
    for unit in context.units:
        result = results.get(unit.name)
        learned = {"loss_before": None, "loss_after": None} if result is None else result.losses()
        rows.append(UnitRow(name=unit.name, kind=unit.kind, layers=unit.layers, **learned))
    planned = len(context.plan.layers) + len(context.plan.attentions)
    return Units(
        units=tuple(rows),
        coverage=Coverage(planned=planned, quantized=num_quantized, kept=len(context.plan.kept)),
        by_kind=count(context.plan, context.traced),
        loss=_loss(context, results),
        warnings=tuple(warnings),
    )


def _loss(context: ReconstructionContext, results: Mapping[str, UnitResult]) -> Loss:
    """Returns the losses summed over the units, and the share of all learned weights that were undecided."""
    if not results:
        return Loss()
    sizes = {unit.name: context.num_weights(unit) for unit in context.units if unit.name in results}
    undecided = sum(sizes[name] * (result.undecided or 0.0) for name, result in results.items())
    return Loss(
        first=sum(result.loss_before for result in results.values()),
        last=sum(result.loss_after for result in results.values()),
        soft=sum(result.loss_soft or 0.0 for result in results.values()),
        undecided=undecided / sum(sizes.values()),
    )


def _total_coverage(parts: Sequence[Units]) -> Coverage:
    coverages = [part.coverage for part in parts]
    return Coverage(
        planned=sum(each.planned for each in coverages),
        quantized=sum(each.quantized for each in coverages),
        kept=sum(each.kept for each in coverages),
    )


def _total_loss(parts: Sequence[Units]) -> Loss:
    """Returns the losses summed over the denoisers, and the largest share of weights that were undecided."""
    losses = [part.loss for part in parts]
    if len(losses) == 1 or any(loss.first is None for loss in losses):
        return losses[0]
    return Loss(
        first=sum(loss.first or 0.0 for loss in losses),
        last=sum(loss.last or 0.0 for loss in losses),
        soft=sum(loss.soft or 0.0 for loss in losses),
        undecided=max(loss.undecided or 0.0 for loss in losses),
    )


def _report_gaps(results: Mapping[str, UnitResult], hyperparameters: Hyperparameters, reporter: Reporter) -> None:
    """Warns if rounding h at the end raised the loss, and names the units that keep their nearest rounding."""
    if not hyperparameters.iterations:
        return
    hard = sum(result.loss_after for result in results.values())
    soft = sum(result.loss_soft or 0.0 for result in results.values())
    if hard > _LARGEST_GAP * soft:
        undecided = [
            name for name, result in results.items() if result.loss_after > _LARGEST_GAP * (result.loss_soft or 0)
        ]
        reporter.warn(
            f"Rounding was not decided when learning ended: the summed loss of the units is {hard:.4g} as deployed and"
            f" {soft:.4g} before h was rounded; {len(undecided)} of {len(results)} units are more than 10% above, such"
            f" as '{undecided[0]}'. Set rounding_sharpness = 20 in the recipe."
        )
    for name, result in results.items():
        if result.is_nearest:
            reporter.note(f"Learning did not improve '{name}', which keeps its weights rounded to nearest.")
