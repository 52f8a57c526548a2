"""`edadm reconstruct`: quantization parameters from a calibration set."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from edadm_cli.artifacts import (
    Artifact,
    Build,
    Coverage,
    Estimate,
    Loss,
    Plan,
    ReconstructRecord,
    RunFolder,
    load_tensors,
    save_json,
    save_tensors,
    shared_keys,
)
from edadm_cli.calibrate.nearest import nearest_params
from edadm_cli.calibrate.planning import count, plan_network
from edadm_cli.calibrate.ranges import part_names, search_ranges
from edadm_cli.config import ReconstructConfig
from edadm_cli.errors import EdadmError
from edadm_cli.models.calibration import CalibrationSet
from edadm_cli.models.collected import load_collected_model
from edadm_cli.models.loading import resolve_device
from edadm_cli.models.registry import known_models
from edadm_cli.models.units import Trace, Unit, trace, units
from edadm_cli.progress import Reporter, SilentReporter
from edadm_cli.quant.plan import QuantizationPlan
from edadm_cli.reconstruct.blocks import BlockReconstruction
from edadm_cli.reconstruct.capture import Batches
from edadm_cli.reconstruct.checkpoint import UNITS_FOLDER, UnitCheckpoints
from edadm_cli.reconstruct.hyperparameters import Hyperparameters, resolve
from edadm_cli.reconstruct.learn import UnitResult
from edadm_cli.reconstruct.network import SwitchableNetwork
from edadm_cli.reconstruct.optimization import repeatable_convolutions

PARAMS_FILE = "quant_params.safetensors"
PLAN_FILE = "plan.json"
UNITS_FILE = "units.json"
_RANGES_FILE = "ranges.safetensors"


@dataclass
class _Setting:
    """Everything a reconstruction works with, on its device."""

    network: SwitchableNetwork
    traced: Trace
    plan: QuantizationPlan
    units: list[Unit]
    batches: Batches
    hyperparameters: Hyperparameters


def run(
    config: ReconstructConfig, run: RunFolder, *, force: bool = False, reporter: Reporter | None = None
) -> ReconstructRecord:
    """Search ranges and learn rounding and scales, unit by unit.

    Raises:
        InputError: There is no calibration set, or the model is not the one it was collected from.
        UsageError: A pattern of the recipe matches no layer.
        EdadmError: A planned layer was not quantized.
    """
    started, reporter = time.monotonic(), reporter or SilentReporter()
    selection = run.open("select")
    with run.build(_plan(config, selection), force) as build:
        is_done = build.up_to_date
        artifact = build.artifact or _build(config, run, selection, build, reporter)
    summary = artifact.json(UNITS_FILE)
    return ReconstructRecord(
        **shared_keys(run.root, artifact, up_to_date=is_done, started=started, warnings=reporter.warnings),
        bits=str(config.bits),
        recipe=config.recipe.name,
        units=len(summary["units"]),
        coverage=Coverage(**summary["coverage"]),
        loss=Loss(**summary["loss"]),
    )


def estimate(config: ReconstructConfig, run: RunFolder) -> Estimate:
    """Time one forward of the denoiser and scale it.

    A unit takes two passes, and an iteration three and a half forwards' worth of the unit's share.
    """
    selection = run.open("select")
    setting = _prepare(config, run, selection)
    (args, kwargs), *_ = iter(setting.batches)
    rows = Batches.rows(args, kwargs)
    with torch.no_grad():
        setting.network.denoiser(*args, **kwargs)
        started = time.monotonic()
        setting.network.denoiser(*args, **kwargs)
        row_seconds = (time.monotonic() - started) / rows
    total_rows = len(setting.batches.calibration) * setting.batches.calibration.branches
    passes = 1 if config.recipe.learn.granularity == "none" else 2 + len(setting.units) / 2
    learning = 0.0
    if config.recipe.learn.granularity != "none":
        learned = setting.hyperparameters
        learning = 3.5 * learned.iterations * learned.batch_size * row_seconds
    weights = sum(p.numel() for p in setting.network.denoiser.parameters())
    megabyte = 1024.0 * 1024.0
    return Estimate(
        seconds=passes * total_rows * row_seconds + learning,
        memory_mib=config.memory_budget_mib + 4 * 4 * weights / megabyte,
        disk_mib=2 * weights / megabyte,
    )


def _plan(config: ReconstructConfig, selection: Artifact) -> Plan:
    fields = config.identity_fields()
    fields["recipe"] = {k: v for k, v in fields["recipe"].items() if k not in ("description", "select")}
    fields["hyperparameters"] = _hyperparameters(config, selection).model_dump(mode="json")
    return Plan("reconstruct", str(config.bits), fields, config.seed, (selection,), selection.manifest.model)


def _hyperparameters(config: ReconstructConfig, selection: Artifact) -> Hyperparameters:
    entry = known_models().get(selection.manifest.model.id)
    return resolve(config.recipe.learn, entry.paper if entry else None, config.bits)


def _prepare(config: ReconstructConfig, run: RunFolder, selection: Artifact) -> _Setting:
    device = resolve_device(config.device)
    model = load_collected_model(run, device, torch.float32)
    batches = Batches(CalibrationSet.load(selection), config.batch_size, device)
    (args, kwargs), *_ = iter(batches.one_sample())
    traced = trace(model.denoiser, args, kwargs)
    plan = plan_network(traced, config.recipe, config.bits)
    network = SwitchableNetwork(model.denoiser, list(plan.layers), list(plan.attentions))
    granularity: Literal["block", "layer"] = "layer" if config.recipe.learn.granularity == "layer" else "block"
    found = units(model.denoiser, traced, set(plan.layers), granularity)
    return _Setting(network, traced, plan, found, batches, _hyperparameters(config, selection))


def _build(
    config: ReconstructConfig, run: RunFolder, selection: Artifact, build: Build, reporter: Reporter
) -> Artifact:
    started = time.monotonic()
    setting = _prepare(config, run, selection)
    with repeatable_convolutions():
        params, results = _reconstruct(config, setting, build.path, reporter)
    quantized = _quantized(setting.plan, params)
    save_tensors(build.path / PARAMS_FILE, params)
    save_json(build.path / PLAN_FILE, setting.plan.model_dump(mode="json", exclude_none=True))
    save_json(build.path / UNITS_FILE, _summary(setting, results, len(quantized)))
    build.discard([UNITS_FOLDER, _RANGES_FILE])
    device = str(setting.batches.device)
    return build.commit(environment={"device": device, "seconds": round(time.monotonic() - started, 3)})


def _reconstruct(
    config: ReconstructConfig, setting: _Setting, folder: Path, reporter: Reporter
) -> tuple[dict[str, Tensor], dict[str, UnitResult]]:
    ranges = _ranges(config, setting, folder, reporter)
    params = nearest_params(setting.network.float_weight, setting.plan, ranges)
    results: dict[str, UnitResult] = {}
    if config.recipe.learn.granularity != "none":
        reconstruction = BlockReconstruction(
            setting.network,
            setting.plan,
            ranges,
            setting.batches,
            setting.hyperparameters,
            config.seed,
            config.memory_budget_mib * 1024 * 1024,
            UnitCheckpoints(folder),
        )
        with reporter.task("reconstruct", len(setting.units)) as advance:
            results = reconstruction.run(setting.units, advance)
        for result in results.values():
            params |= result.params
    return params, results


def _ranges(config: ReconstructConfig, setting: _Setting, folder: Path, reporter: Reporter) -> dict[str, Tensor]:
    kept = folder / _RANGES_FILE
    if kept.is_file():
        return load_tensors(kept)
    network = setting.network
    with reporter.task("search ranges", len(setting.batches)) as advance, network.full_precision():
        found = search_ranges(
            network.denoiser, setting.traced, setting.plan, config.recipe.ranges, setting.batches, advance
        )
    save_tensors(kept, found)
    return found


def _quantized(plan: QuantizationPlan, params: Mapping[str, Tensor]) -> list[str]:
    """Names of the planned layers and attentions that have parameters: all of them, or it is an error."""
    keys = {name: f"{part_names(name, layer)[-1]}.weight_int" for name, layer in plan.layers.items()} | {
        name: f"{name}.q_scale" for name in plan.attentions
    }
    missing = [name for name, key in keys.items() if key not in params]
    if missing:
        raise EdadmError(f"{len(missing)} planned layers were not quantized: {', '.join(missing)}.")
    return list(keys)


def _summary(setting: _Setting, results: Mapping[str, UnitResult], num_quantized: int) -> dict[str, Any]:
    rows = []
    for unit in setting.units:
        result = results.get(unit.name)
        losses: dict[str, Any] = {"loss_before": None, "loss_after": None, "curve": []}
        if result is not None:
            losses = {"loss_before": result.loss_before, "loss_after": result.loss_after, "curve": result.curve}
        rows.append({"name": unit.name, "kind": unit.kind, "layers": list(unit.layers), **losses})
    planned = len(setting.plan.layers) + len(setting.plan.attentions)
    first = sum(result.loss_before for result in results.values()) if results else None
    last = sum(result.loss_after for result in results.values()) if results else None
    return {
        "units": rows,
        "coverage": {"planned": planned, "quantized": num_quantized, "kept": len(setting.plan.kept)},
        "by_kind": count(setting.plan, setting.traced),
        "loss": {"first": first, "last": last},
    }
