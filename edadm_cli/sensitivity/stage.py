"""`edadm sensitivity`: measures and ranks the rise of the final error per layer and number of bits."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from edadm_cli.artifacts import (
    Artifact,
    Build,
    BuildSpec,
    LayerSensitivity,
    RunFolder,
    Selection,
    Sensitivity,
    SensitivityRecord,
    load_json,
    save_json,
    shared_keys,
)
from edadm_cli.calibrate.planning import plan_network
from edadm_cli.calibrate.ranges import search_activation_ranges, search_weight_scales
from edadm_cli.config import BitWidth, SensitivityConfig
from edadm_cli.errors import UsageError
from edadm_cli.models.calibration import CalibrationSet
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.families import Call
from edadm_cli.models.loading import LoadedModel, resolve_device
from edadm_cli.models.sampling import sample
from edadm_cli.models.units import Trace, trace, units
from edadm_cli.progress import Reporter, SilentReporter
from edadm_cli.quant.plan import LayerPlan, QuantizationPlan
from edadm_cli.sensitivity.gains import StepGains, measure_gains
from edadm_cli.sensitivity.layer_errors import PredictionError, layer_errors
from edadm_cli.sensitivity.plot import plot_sensitivity

PLOT_FILE = "sensitivity.png"
_GAINS_FILE = "gains.json"
_PROGRESS_FILE = "progress.json"


def run(
    config: SensitivityConfig, run_folder: RunFolder, *, force: bool = False, reporter: Reporter | None = None
) -> SensitivityRecord:
    """Measures every layer at every number of bits, and writes the `sensitivity` artifact.

    Raises:
        InputError: There is no calibration set, or the model is not the one that it was collected from.
        UsageError: A pattern of the recipe matches no layer.
    """
    started, reporter = time.monotonic(), reporter or SilentReporter()
    task = resolve_task(config, run_folder)
    with run_folder.build(task.build_spec(), force) as build:
        is_done = build.up_to_date
        if not is_done:
            _measure(task, build, reporter)
        artifact = build.finished()
    result = Sensitivity.load(artifact)
    lowest = min(config.weight_bits)
    return SensitivityRecord(
        **shared_keys(run_folder.root, artifact, up_to_date=is_done, started=started, warnings=reporter.warnings),
        layers=len(result.layers),
        most_sensitive={layer.name: layer.weight_errors[lowest] for layer in result.ranked(lowest)[:10]},
    )


def build_spec(config: SensitivityConfig, run_folder: RunFolder) -> BuildSpec:
    """Returns the description of the artifact that `run` would build."""
    return resolve_task(config, run_folder).build_spec()


def artifact_name(config: SensitivityConfig) -> None:
    """Returns `None`: a run has one artifact of this kind."""


@dataclass(frozen=True)
class _Task:
    """A configuration whose open choices are all decided."""

    config: SensitivityConfig
    collected: CollectedRun
    selection: Artifact
    calibration: CalibrationSet
    device: torch.device
    batch_size: int

    @property
    def num_samples(self) -> int:
        return min(self.config.num_samples, len(self.calibration))

    @property
    def num_steps(self) -> int:
        """Number of steps in one run of the sampler; the calibration set need not hold samples of all of them."""
        return len(Selection.load(self.selection).counts)

    def build_spec(self) -> BuildSpec:
        fields = {**self.config.identity_fields(), "batch_size": self.batch_size}
        other = {"description", "collect", "select", "learn"}
        fields["recipe"] = {key: value for key, value in fields["recipe"].items() if key not in other}
        model = self.selection.manifest.model
        return BuildSpec("sensitivity", None, fields, self.config.seed, (self.selection,), model)

    def calls(self) -> list[tuple[Call, Tensor]]:
        """Returns batches of calibration samples, spread evenly over the set, each with the steps of its samples."""
        order = torch.linspace(0, len(self.calibration) - 1, self.num_samples).round().long()
        return [
            (self.calibration.call(part, self.device, torch.float32), self.calibration.step_index[part])
            for part in order.split(self.batch_size)
        ]


def resolve_task(config: SensitivityConfig, run_folder: RunFolder) -> _Task:
    """Decides what the configuration leaves open, without loading the model."""
    collected = CollectedRun.open(run_folder)
    selection = run_folder.open("select")
    batch_size = config.batch_size or collected.entry.batch_size
    if len(collected.places) > 1:
        raise UsageError(
            f"{collected.model.id} has {len(collected.places)} denoisers, and a sensitivity is measured for one: their "
            "layers cannot share a budget of bits.",
            hint="edadm reconstruct --bits w4a8, or another width that all layers have",
        )
    calibration = CalibrationSet.load(selection)
    return _Task(config, collected, selection, calibration, resolve_device(config.device), batch_size)


def _measure(task: _Task, build: Build, reporter: Reporter) -> None:
    model = task.collected.load(task.device, torch.float32)
    gains = _gains(task, model, build.path, reporter)
    calls = task.calls()
    traced = trace(model.denoiser, *calls[0][0])
    error = PredictionError(
        model.denoiser, calls, gains, task.calibration.branches, task.collected.guidance_scale or 1.0
    )
    candidates = _candidates(task, model.denoiser, traced, [call for call, _ in calls])
    layers = _measure_layers(model.denoiser, traced, candidates, error, build.path / _PROGRESS_FILE, reporter)
    result = Sensitivity(layers=tuple(layers), step_gains=tuple(gains.gains.tolist()), num_samples=task.num_samples)
    result.save(build.path)
    plot_sensitivity(build.path / PLOT_FILE, result)
    build.discard([_GAINS_FILE, _PROGRESS_FILE])
    build.commit(environment={"device": str(task.device)})


def _gains(task: _Task, model: LoadedModel, folder: Path, reporter: Reporter) -> StepGains:
    """Returns the gains of the steps, from a file if a killed run has measured them."""
    path = folder / _GAINS_FILE
    if not path.is_file():
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

        with reporter.task("Measuring the effect of each step", task.num_steps + 1) as advance:
            measured = measure_gains(
                model.denoiser, generate, task.num_steps, task.calibration.branches, task.config.seed, advance
            )
        save_json(path, {"gains": measured.gains.tolist(), "final_energy": measured.final_energy})
    values = load_json(path)
    return StepGains(torch.tensor(values["gains"], dtype=torch.float64), values["final_energy"])


@dataclass(frozen=True)
class _Candidates:
    """The numbers of bits that one layer is measured at, with the plan and the ranges of each."""

    weight: dict[int, tuple[LayerPlan, Mapping[str, Tensor]]]
    activation: dict[int, tuple[LayerPlan, Mapping[str, Tensor]]]


def _candidates(task: _Task, denoiser: nn.Module, traced: Trace, calls: list[Call]) -> dict[str, _Candidates]:
    """Returns every quantizable layer with its candidates, in the order of execution."""
    config, ranges = task.config, task.config.recipe.ranges
    if ranges.weight == "output-error":  # its statistics belong to a whole plan, but here single layers are compared
        ranges = ranges.model_copy(update={"weight": "search"})
    full = plan_network(traced, config.recipe, BitWidth(weight=8, activation=8))
    candidates = {name: _Candidates({}, {}) for name in full.layers}
    for bits in config.weight_bits:
        layers = {
            name: LayerPlan(weight_bits=bits, channel_parts=plan.channel_parts) for name, plan in full.layers.items()
        }
        scales = search_weight_scales(traced, QuantizationPlan(layers=layers), ranges)
        for name, plan in layers.items():
            candidates[name].weight[bits] = (plan, scales)
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
    denoiser: nn.Module,
    traced: Trace,
    candidates: Mapping[str, _Candidates],
    error: PredictionError,
    progress: Path,
    reporter: Reporter,
) -> list[LayerSensitivity]:
    """Measures layer by layer; a layer that a killed run has measured is read from `progress`."""
    unit_of = {layer: unit.name for unit in units(denoiser, traced, set(candidates), "block") for layer in unit.layers}
    done = {
        row["name"]: LayerSensitivity.model_validate(row) for row in (load_json(progress) if progress.is_file() else [])
    }
    total = sum(len(layer.weight) + len(layer.activation) for layer in candidates.values())
    with reporter.task("Measuring layers", total) as advance:
        for name, layer in candidates.items():
            if name in done:
                advance(len(layer.weight) + len(layer.activation))
                continue
            done[name] = LayerSensitivity(
                name=name,
                unit=unit_of.get(name, name),
                num_weights=denoiser.get_submodule(name).get_parameter("weight").numel(),
                weight_errors=layer_errors(error, name, layer.weight, advance),
                activation_errors=layer_errors(error, name, layer.activation, advance),
            )
            save_json(progress, [row.model_dump(mode="json") for row in done.values()])
    return [done[name] for name in candidates]
