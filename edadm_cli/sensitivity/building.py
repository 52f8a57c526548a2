"""Measures the error of each layer of a denoiser at each number of bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from edadm_cli.artifacts import (
    Build,
    LayerSensitivity,
    Selection,
    Sensitivity,
    load_json,
    save_json,
)
from edadm_cli.calibrate.planning import plan_network
from edadm_cli.calibrate.ranges import search_activation_ranges, search_weight_scales
from edadm_cli.config import BitWidth
from edadm_cli.models.denoiser_calls.calibration import CalibrationSet
from edadm_cli.models.families import Call
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.pipeline_calls.sampling import sample
from edadm_cli.models.units import Trace, trace, units
from edadm_cli.progress import Reporter
from edadm_cli.quant.plan import LayerPlan, QuantizationPlan, name_within
from edadm_cli.sensitivity.final_distance import FinalDistance, reference_width, scaled
from edadm_cli.sensitivity.gains import StepGains, measure_gains
from edadm_cli.sensitivity.layer_errors import PredictionError, layer_errors, one_layer_quantized
from edadm_cli.sensitivity.plot import plot_sensitivity
from edadm_cli.sensitivity.task import Task

PLOT_FILE = "sensitivity.png"
_PROGRESS_FILE = "progress.json"


@dataclass(frozen=True)
class Part:
    """What is measured of one denoiser.

    Attributes:
        task: The measurement.
        place: The denoiser; see `CollectedRun.places`.
        calibration: Its calibration set.
        num_steps: The steps of a run of the sampler at which it is called; the calibration set need not hold samples of
            all of them.
    """

    task: Task
    place: str
    calibration: CalibrationSet
    num_steps: int

    @property
    def num_samples(self) -> int:
        """The number of calibration samples that are used."""
        return min(self.task.config.num_samples, len(self.calibration))

    @property
    def gains_file(self) -> str:
        """The file that keeps the gains of the steps until everything is measured."""
        return f"gains-{self.place}.json" if self.place else "gains.json"

    def calls(self) -> list[tuple[Call, Tensor]]:
        """Returns batches of calibration samples, spread evenly over the set, each with the steps of its samples."""
        order = torch.linspace(0, len(self.calibration) - 1, self.num_samples).round().long()
        return [
            (self.calibration.call(rows, self.task.device, torch.float32), self.calibration.step_index[rows])
            for rows in order.split(self.task.batch_size)
        ]


def parts_of(task: Task) -> list[Part]:
    """Returns what belongs to each denoiser."""
    selections = {place: task.selection.within(place) for place in task.collected.places}
    return [
        Part(task, place, CalibrationSet.load(selection), len(Selection.load(selection).counts))
        for place, selection in selections.items()
    ]


def measure(task: Task, build: Build, reporter: Reporter) -> None:
    """Measures the layers of all denoisers, and commits the artifact.

    Raises:
        InputError: The model is not the one that was collected from.
        UsageError: A pattern of the recipe matches no layer.
    """
    model, parts = task.collected.load(task.device, torch.float32), parts_of(task)
    layers: list[LayerSensitivity] = []
    step_gains: list[float] = []
    for part in parts:
        gains = _gains(part, model, build.path, reporter)
        layers += _measure_denoiser(part, model, gains, build.path, reporter)
        step_gains += gains.gains.tolist()
    num_samples = sum(part.num_samples for part in parts)
    result = Sensitivity(
        layers=tuple(layers),
        step_gains=tuple(step_gains),
        num_samples=num_samples,
        group_size=task.config.group_size,
    )
    result.save(build.path)
    plot_sensitivity(build.path / PLOT_FILE, result)
    build.discard([*(part.gains_file for part in parts), _PROGRESS_FILE])
    build.commit(environment={"device": str(task.device)})


def _measure_denoiser(
    part: Part, model: LoadedModel, gains: StepGains, folder: Path, reporter: Reporter
) -> list[LayerSensitivity]:
    """Measures the layers of one denoiser."""
    denoiser, calls = model.by_denoiser()[part.place].denoiser, part.calls()
    traced = trace(denoiser, *calls[0][0])
    scale = part.task.collected.guidance_scale or 1.0
    error = PredictionError(denoiser, calls, gains, part.calibration.branches, scale)
    candidates = _candidates(part.task, denoiser, traced, [call for call, _ in calls])
    final = FinalDistance(_generator(part.task, model))
    return _measure_layers(part.place, traced, candidates, error, final, folder / _PROGRESS_FILE, reporter)


def _generator(task: Task, model: LoadedModel) -> Callable[[], Tensor]:
    """Returns a function that samples the same images every time, and returns their final latents."""
    sampling = task.collected.sampling
    number = min(task.config.num_images, len(sampling.seeds))

    def generate() -> Tensor:
        return sample(
            model,
            seeds=sampling.seeds[:number],
            prompts=None if sampling.prompts is None else sampling.prompts[:number],
            num_steps=sampling.num_steps,
            guidance_scale=sampling.guidance_scale,
        ).latents

    return generate


def _gains(part: Part, model: LoadedModel, folder: Path, reporter: Reporter) -> StepGains:
    """Returns the gains of a denoiser's steps, from a file if a killed run has measured them."""
    path, task = folder / part.gains_file, part.task
    if not path.is_file():
        denoiser, generate = model.by_denoiser()[part.place].denoiser, _generator(task, model)
        with reporter.task("Measuring the effect of each step", part.num_steps + 1) as advance:
            measured = measure_gains(
                denoiser, generate, part.num_steps, part.calibration.branches, task.config.seed, advance
            )
        save_json(path, {"gains": measured.gains.tolist(), "final_energy": measured.final_energy})
    values = load_json(path)
    return StepGains(torch.tensor(values["gains"], dtype=torch.float64), values["final_energy"])


@dataclass(frozen=True)
class _Candidates:
    """The numbers of bits that one layer is measured at, with the plan and the ranges of each."""

    weight: dict[int, tuple[LayerPlan, Mapping[str, Tensor]]]
    grouped: dict[int, tuple[LayerPlan, Mapping[str, Tensor]]]
    activation: dict[int, tuple[LayerPlan, Mapping[str, Tensor]]]

    @property
    def count(self) -> int:
        """How many measurements there are: one of each, and one of final samples."""
        return len(self.weight) + len(self.grouped) + len(self.activation) + 1


def _candidates(task: Task, denoiser: nn.Module, traced: Trace, calls: list[Call]) -> dict[str, _Candidates]:
    """Returns every quantizable layer with its candidates, in the order of execution."""
    config, ranges = task.config, task.config.recipe.ranges
    if ranges.weight == "output-error":  # its statistics belong to a whole plan, but here single layers are compared
        ranges = ranges.model_copy(update={"weight": "search"})
    full = plan_network(traced, config.recipe, BitWidth(weight=8, activation=8))
    candidates = {name: _Candidates({}, {}, {}) for name in full.layers}
    for bits, size in [
        *((b, None) for b in config.weight_bits),
        *((b, config.group_size) for b in config.grouped_bits),
    ]:
        layers = {
            name: LayerPlan(weight_bits=bits, group_size=size, channel_parts=plan.channel_parts)
            for name, plan in full.layers.items()
        }
        scales = search_weight_scales(traced, QuantizationPlan(layers=layers), ranges)
        for name, plan in layers.items():
            (candidates[name].weight if size is None else candidates[name].grouped)[bits] = (plan, scales)
    eight = search_weight_scales(traced, QuantizationPlan(layers=full.layers), ranges)
    for bits in config.activation_bits:
        layers = {
            name: plan.model_copy(update={"weight_bits": 8, "activation_bits": bits, "transform": None})
            for name, plan in full.layers.items()
            if plan.input_grid is not None
        }
        inputs = search_activation_ranges(denoiser, traced, QuantizationPlan(layers=layers), ranges, calls)
        for name, plan in layers.items():
            candidates[name].activation[bits] = (plan, eight | inputs)
    return candidates


def _measure_layers(
    place: str,
    traced: Trace,
    candidates: Mapping[str, _Candidates],
    error: PredictionError,
    final: FinalDistance,
    progress: Path,
    reporter: Reporter,
) -> list[LayerSensitivity]:
    """Measures layer by layer; a layer that a killed run has measured is read from `progress`.

    The errors of weights are scaled so that the one at a reference width is the measured distance of final samples.
    The names of the layers are those within the pipeline; see `name_within`.
    """
    denoiser = error.denoiser
    unit_of = {layer: unit.name for unit in units(denoiser, traced, set(candidates), "block") for layer in unit.layers}
    done = {
        row["name"]: LayerSensitivity.model_validate(row) for row in (load_json(progress) if progress.is_file() else [])
    }
    with reporter.task("Measuring layers", sum(layer.count for layer in candidates.values())) as advance:
        for name, layer in candidates.items():
            full_name = name_within(place, name)
            if full_name in done:
                advance(layer.count)
                continue
            weight_errors = layer_errors(error, name, layer.weight, advance)
            reference = reference_width(layer.weight)
            with one_layer_quantized(denoiser, name, *layer.weight[reference]):
                factor = final.measure() / max(weight_errors[reference], 1e-30)
            advance(1)
            grouped = layer_errors(error, name, layer.grouped, advance) if layer.grouped else {}
            done[full_name] = LayerSensitivity(
                name=full_name,
                unit=name_within(place, unit_of.get(name, name)),
                num_weights=denoiser.get_submodule(name).get_parameter("weight").numel(),
                weight_errors=scaled(weight_errors, factor),
                group_errors=scaled(grouped, factor),
                final_ratio=factor,
                activation_errors=layer_errors(error, name, layer.activation, advance),
            )
            save_json(progress, [row.model_dump(mode="json") for row in done.values()])
    return [done[name_within(place, name)] for name in candidates]
