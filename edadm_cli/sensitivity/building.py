"""Measures the effect of each layer of a pipeline's denoisers on the final sample, at each number of bits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
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
from edadm_cli.config import BitWidth
from edadm_cli.errors import InputError
from edadm_cli.models.denoiser_calls.calibration import CalibrationSet
from edadm_cli.models.families import Call
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.pipeline_calls.backward_sweep import (
    NUM_DIRECTIONS,
    explained_gradients,
    freeze,
    random_directions,
    record_images,
)
from edadm_cli.models.pipeline_calls.recorded_sampling import NoGradientError
from edadm_cli.models.units import trace, units
from edadm_cli.progress import Reporter
from edadm_cli.quant.plan import name_within
from edadm_cli.recipe import Recipe
from edadm_cli.sensitivity.candidates import LayerCandidates, layer_candidates
from edadm_cli.sensitivity.effects import measure_effects
from edadm_cli.sensitivity.plot import plot_sensitivity
from edadm_cli.sensitivity.task import Task

PLOT_FILE = "sensitivity.png"
_EQUAL_BITS_HINT = "edadm reconstruct --bits w4a8, or another width that all layers have"
_PROGRESS_FILE = "progress.json"
_NUM_PARTS = 2  # at least so many parts of the images, so that a killed run has lost at most half
_SMALLEST = 1e-18  # of a squared distance, so that a layer without any effect has a logarithm


@dataclass(frozen=True)
class Part:
    """What is measured of one denoiser.

    Attributes:
        task: The measurement.
        place: The denoiser; see `CollectedRun.places`.
        calibration: Its calibration set, by which ranges are searched.
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

    def calls(self) -> list[Call]:
        """Returns batches of calibration samples, spread evenly over the set."""
        order = torch.linspace(0, len(self.calibration) - 1, self.num_samples).round().long()
        return [
            self.calibration.call(rows, self.task.device, torch.float32) for rows in order.split(self.task.batch_size)
        ]


def parts_of(task: Task) -> list[Part]:
    """Returns what belongs to each denoiser."""
    selections = {place: task.selection.within(place) for place in task.collected.places}
    return [
        Part(task, place, CalibrationSet.load(selection), len(Selection.load(selection).counts))
        for place, selection in selections.items()
    ]


@dataclass(frozen=True)
class Layers:
    """The layers of one denoiser that are measured.

    Attributes:
        part: The denoiser.
        denoiser: Its network, at full precision.
        candidates: The candidates of each layer.
        unit_of: The unit that each layer is reconstructed with.
    """

    part: Part
    denoiser: nn.Module
    candidates: dict[str, LayerCandidates]
    unit_of: dict[str, str]


@dataclass
class Progress:
    """The measured images.

    Attributes:
        effects: By layer, the relative squared change of the final sample by each candidate, image by image, as a mean
            over the directions.
        gains: By denoiser, the gain of each of its steps, image by image.
        num_images: The number of images so far.
    """

    effects: dict[str, list[list[float]]] = field(default_factory=dict)
    gains: dict[str, list[list[float]]] = field(default_factory=dict)
    num_images: int = 0

    def add(self, effects: dict[str, Tensor], gains: dict[str, Tensor], num_images: int) -> None:
        """Adds some images.

        Args:
            effects: By layer, with shape `(count, N)`.
            gains: By denoiser, with shape `(T, N)`.
            num_images: N.
        """
        for table, added in ((self.effects, effects), (self.gains, gains)):
            for name, values in added.items():
                rows = table.setdefault(name, [[] for _ in values])
                for row, more in zip(rows, values.tolist(), strict=True):
                    row += more
        self.num_images += num_images


def measure(task: Task, build: Build, reporter: Reporter) -> None:
    """Measures the layers of all denoisers, and commits the artifact.

    Raises:
        InputError: The model is not the one that was collected from, or its sampler has no gradient.
        UsageError: A pattern of the recipe matches no layer.
    """
    model, parts = task.collected.load(task.device, torch.float32), parts_of(task)
    freeze(model)
    layers = [_layers_of(part, model.by_denoiser()[part.place].denoiser) for part in parts]
    try:
        progress = _measure_images(task, model, layers, build.path / _PROGRESS_FILE, reporter)
    except NoGradientError as error:
        raise InputError(error.message, hint=_EQUAL_BITS_HINT) from error
    result = Sensitivity(
        layers=tuple(row for each in layers for row in _rows(each, progress)),
        step_gains=tuple(sum(gain) / len(gain) for part in parts for gain in progress.gains[part.place]),
        num_samples=sum(part.num_samples for part in parts),
        group_size=task.config.group_size,
    )
    result.save(build.path)
    plot_sensitivity(build.path / PLOT_FILE, result)
    build.discard([_PROGRESS_FILE])
    build.commit(environment={"device": str(task.device)})


def _layers_of(part: Part, denoiser: nn.Module) -> Layers:
    """Returns the layers of a denoiser with their candidates."""
    calls, config = part.calls(), part.task.config
    traced = trace(denoiser, *calls[0])
    full = plan_network(traced, config.recipe, BitWidth(weight=8, activation=8)).layers
    candidates = layer_candidates(config, denoiser, traced, full, calls)
    named = units(denoiser, traced, set(full), "block")
    return Layers(part, denoiser, candidates, {layer: unit.name for unit in named for layer in unit.layers})


def images_at_once(task: Task) -> int:
    """Returns the number of images that are measured together."""
    return min(task.batch_size, math.ceil(num_images(task) / _NUM_PARTS))


def num_images(task: Task) -> int:
    """Returns the number of images that are measured."""
    return min(task.config.num_images, len(task.collected.sampling.seeds))


def _measure_images(task: Task, model: LoadedModel, layers: list[Layers], path: Path, reporter: Reporter) -> Progress:
    """Measures some images at a time; those that a killed run has measured are read from `path`."""
    progress = Progress(**load_json(path)) if path.is_file() else Progress()
    total, at_once = num_images(task), images_at_once(task)
    with reporter.task("Measuring layers", total) as advance:
        advance(progress.num_images)
        while progress.num_images < total:
            images = slice(progress.num_images, min(progress.num_images + at_once, total))
            with explained_gradients(model):
                effects, gains = _measure_some(task, model, layers, images)
            progress.add(effects, gains, images.stop - images.start)
            save_json(path, vars(progress))
            advance(images.stop - images.start)
    return progress


def _measure_some(
    task: Task, model: LoadedModel, layers: list[Layers], images: slice
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Measures all layers on some images.

    Returns:
        The relative squared changes and the gains of `Progress.add`.

    Raises:
        NoGradientError: The final samples have no gradient, or it is not finite.
    """
    denoisers = {each.part.place: each.denoiser for each in layers}
    sampling = task.collected.sampling
    recorded = record_images(model, sampling, images)
    directions = random_directions(recorded.final, sampling.seeds[images], task.config.seed)
    candidates = {each.part.place: each.candidates for each in layers}
    num_steps = {each.part.place: each.part.num_steps for each in layers}
    measured = measure_effects(recorded, denoisers, candidates, directions, num_steps)
    energy = recorded.final.detach().double().flatten(1).square().sum(1).clamp_min(1e-30)
    effects = {
        name_within(place, name): change.square().mean(0) / energy
        for place, named in measured.layers.items()
        for name, change in named.items()
    }
    if not all(bool(values.isfinite().all()) for values in effects.values()):
        raise NoGradientError(
            f"{model.ref.id}: the gradient of the final sample is not finite, so layers cannot be compared."
        )
    return effects, measured.gains


def _rows(layers: Layers, progress: Progress) -> list[LayerSensitivity]:
    """Returns the errors of a denoiser's layers."""
    rows, place = [], layers.part.place
    for name, layer in layers.candidates.items():
        full_name = name_within(place, name)
        errors = iter([typical_error(values) for values in progress.effects[full_name]])
        of_weights = {bits: next(errors) for bits in layer.weight_bits}
        of_groups = {bits: next(errors) for bits in layer.grouped_bits}
        by_gptq = {bits: next(errors) for bits in layer.gptq_bits}
        factor = _learning_factor(of_weights, by_gptq, layers.part.task.config.recipe)
        rows.append(
            LayerSensitivity(
                name=full_name,
                unit=name_within(place, layers.unit_of.get(name, name)),
                num_weights=layer.layer.get_parameter("weight").numel(),
                weight_errors={bits: error * (factor or 1.0) for bits, error in of_weights.items()},
                group_errors={bits: error * (factor or 1.0) for bits, error in of_groups.items()},
                learning_factor=factor,
                activation_errors={bits: next(errors) for bits in layer.activation_bits},
            )
        )
    return rows


def _learning_factor(nearest: dict[int, float], by_gptq: dict[int, float], recipe: Recipe) -> float | None:
    """Returns the factor by which the recipe's rounding changes the error of a layer; `None` for nearest rounding.

    GPTQ lets the errors of an output channel's weights cancel each other where their inputs are alike, as learning
    does. Of the forms that were tried on one learned denoiser, the geometric mean of the errors of GPTQ and nearest
    rounding is closest to what learning leaves (docs/results-digits.md, Mixed bits).
    """
    for bits, error in by_gptq.items():
        ratio = error / max(nearest[bits], 1e-30)
        return ratio if recipe.rounding == "gptq" else ratio**0.5
    return None


def typical_error(errors: list[float]) -> float:
    """Returns the geometric mean of errors over the images; single images that become others would decide a mean.

    Each error is a mean of the squares of K normal numbers, whose logarithm is too small by log(K / 2) - digamma(K / 2)
    in the mean.
    """
    half = torch.tensor(NUM_DIRECTIONS / 2, dtype=torch.float64)
    logarithms = torch.tensor(errors, dtype=torch.float64).clamp_min(_SMALLEST).log()
    return float((logarithms.mean() + half.log() - half.digamma()).exp())
