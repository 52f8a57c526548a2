"""Loads a pipeline: by known name, from a diffusers folder, a checkpoint file or the hub, or with random weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from edadm_cli.artifacts import ModelRef
from edadm_cli.errors import InputError, MachineError, UsageError
from edadm_cli.models.architecture import (
    DENOISER_NAMES,
    FURTHER_DENOISERS,
    WEIGHTS_VERSION,
    find_class,
    load_architecture,
)
from edadm_cli.models.checkpoints.opening import open_checkpoint
from edadm_cli.models.families.registry import float32_pipelines
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.pipeline_calls.call_arguments import default_guidance
from edadm_cli.models.pipeline_calls.parameters import call_default, takes_guidance
from edadm_cli.models.placement import Placement
from edadm_cli.models.quiet import quiet_libraries
from edadm_cli.models.random_models import build_random_pipeline
from edadm_cli.models.registry import ModelEntry, known_models
from edadm_cli.models.sources.containment import no_questions
from edadm_cli.models.sources.folder import read_folder
from edadm_cli.models.sources.from_folder import load_folder
from edadm_cli.models.sources.locating import Location, files_of, is_random
from edadm_cli.models.sources.stored_denoiser import denoisers_of, stored_architecture, stored_component
from edadm_cli.progress import long_step

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def resolve_device(name: str) -> torch.device:
    """Turns `cpu`, `cuda`, `cuda:N` or `auto` into a device of this machine.

    On CUDA, this turns TF32 off: torch lets convolutions round their factors to TF32 by default, whose error is far
    above the bound that engines have to meet.

    Raises:
        MachineError: This machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise MachineError(f"There is no device '{name}'; --device takes cpu, cuda, cuda:N or auto.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MachineError(
            f"There is no device '{name}' on this machine, which has {torch.cuda.device_count()} CUDA devices.",
            hint="--device cpu",
        )
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return device


def load_model(
    model: str,
    device: torch.device,
    dtype: torch.dtype,
    entry: ModelEntry | None = None,
    prediction_type: str | None = None,
    placement: Placement = "memory",
    location: Location | None = None,
) -> LoadedModel:
    """Loads a pipeline and checks it.

    Args:
        model: A known name, a diffusers folder, a checkpoint file, or a hub id.
        device: The device that it computes on.
        dtype: Element type of its floating-point weights and activations.
        entry: Its defaults, when the caller knows them better than the registry: an exported folder has those of the
            model that it was exported from.
        prediction_type: What the denoiser predicts (`epsilon`, `v_prediction` or `sample`), when the caller knows it
            better than the model's files.
        placement: Where the weights are; other than `memory`, the denoiser reads the weights of its layers whenever
            they are used, until `encode_first` or `bring_stored` changes that. A model whose denoiser cannot be read in
            this way, such as a single file, is in memory all the same.
        location: Where its files are, when the caller has asked already: a hub model is then that of the same commit.

    Raises:
        InputError: The model is missing, broken or pickled, comes with code, or has weights that are not finite.
        MachineError: It does not fit into the device's memory.
        UsageError: Its pipeline cannot sample in that element type, or its scheduler has no prediction type.
    """
    entry = entry or known_models().get(model)
    with quiet_libraries(), no_questions():
        try:
            source = _open(model, entry, dtype, device, placement != "memory", location)
            pipeline = _configured(source.pipeline, entry).to(device)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise MachineError(f"{model} does not fit into the memory of {device}.") from error
    if dtype != torch.float32 and type(pipeline).__name__ in float32_pipelines():
        raise UsageError(
            f"{type(pipeline).__name__} of diffusers samples in float32 only, so {model} is not loaded in {dtype}.",
            hint="--dtype float32",
        )
    names = [name for name in (*DENOISER_NAMES, *FURTHER_DENOISERS) if _is_module(pipeline, name)]
    if not names:
        raise InputError(f"{model} has neither a 'unet' nor a 'transformer', so there is no denoiser to quantize.")
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.eval().requires_grad_(False)
    denoiser_name, *further = names
    identifier = entry.name if entry and model == entry.name else _identifier(model)
    ref = ModelRef(id=identifier, revision=source.revision, fingerprint=source.fingerprint)
    entry = entry or _entry_of(identifier, pipeline, denoiser_name, source.known_as)
    remarks = source.remarks
    if prediction_type is not None:
        entry = _with_prediction_type(pipeline, entry, prediction_type)
        remarks = tuple(remark for remark in remarks if "--prediction-type" not in remark)
    where = placement if source.has_stored_denoiser else "memory"
    return LoadedModel(ref, entry, pipeline, denoiser_name, source.folder, remarks, tuple(further), where)


@dataclass(frozen=True)
class _Source:
    """A pipeline as it comes from its source, before the entry's scheduler is applied.

    Attributes:
        pipeline: The pipeline.
        fingerprint: The hash of what decides its weights.
        revision: The commit on the hub; `None` for a model from elsewhere.
        folder: The folder of its files; `None` for a pipeline that was built or converted in memory.
        known_as: The known model that a checkpoint file is built like; `None` if there is none.
        remarks: Sentences for the user.
        has_stored_denoiser: Whether the denoiser reads its weights whenever they are used.
    """

    pipeline: DiffusionPipeline
    fingerprint: str
    revision: str | None = None
    folder: Path | None = None
    known_as: str | None = None
    remarks: tuple[str, ...] = ()
    has_stored_denoiser: bool = False


def _open(
    model: str,
    entry: ModelEntry | None,
    dtype: torch.dtype,
    device: torch.device,
    stored: bool,
    location: Location | None,
) -> _Source:
    """Opens a model, wherever it is; with `stored`, the denoiser reads its weights whenever they are used."""
    if entry is not None and is_random(model, entry):
        architecture, seed = load_architecture(entry.location), entry.weights_seed
        fingerprint = architecture.fingerprint(seed, WEIGHTS_VERSION)
        ready = {}
        if stored:
            ready[architecture.denoiser_name] = stored_architecture(architecture, seed).place(device, dtype)
        with long_step(lambda: f"generating the random weights of {model}"):
            pipeline = build_random_pipeline(architecture, seed, dtype, device, ready)
        return _Source(pipeline, fingerprint, has_stored_denoiser=stored)
    path, revision = location if isinstance(location, tuple) else files_of(model, entry)
    with long_step(lambda: f"loading {model}"):
        return _read(path, revision, dtype, device, stored)


def _read(path: Path, revision: str | None, dtype: torch.dtype, device: torch.device, stored: bool) -> _Source:
    """Opens a checkpoint file or a diffusers folder; the denoiser of a file is always in memory."""
    if path.is_file():
        checkpoint = open_checkpoint(path, dtype)
        return _Source(
            checkpoint.pipeline, checkpoint.fingerprint, known_as=checkpoint.known_as, remarks=checkpoint.remarks
        )
    folder = read_folder(path)
    denoisers = [stored_component(folder, name, dtype) for name in (denoisers_of(folder) if stored else ())]
    ready = {denoiser.name: denoiser.place(device, dtype) for denoiser in denoisers if denoiser is not None}
    pipeline = load_folder(folder, dtype, ready, device)
    return _Source(pipeline, folder.fingerprint(), revision, path, has_stored_denoiser=bool(ready))


def _configured(pipeline: DiffusionPipeline, entry: ModelEntry | None) -> DiffusionPipeline:
    """Returns the pipeline with the class and the scheduler that its entry names."""
    if entry is not None and entry.pipeline_class is not None:
        pipeline = find_class(entry.pipeline_class)(**pipeline.components)
    if entry is not None and (entry.scheduler_class is not None or entry.scheduler_config):
        name = entry.scheduler_class
        scheduler = type(pipeline.scheduler) if name is None else find_class(name)
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **entry.scheduler_config)
    return pipeline


def _with_prediction_type(pipeline: DiffusionPipeline, entry: ModelEntry, prediction_type: str) -> ModelEntry:
    """Sets what the scheduler takes the denoiser's output for; later stages read it from the entry."""
    scheduler = pipeline.scheduler
    if "prediction_type" not in scheduler.config:
        raise UsageError(
            f"{type(scheduler).__name__} has no prediction type, so --prediction-type has no meaning for this model."
        )
    change = {"prediction_type": prediction_type}
    pipeline.scheduler = type(scheduler).from_config(scheduler.config, **change)
    return entry.model_copy(update={"scheduler_config": {**entry.scheduler_config, **change}})


def _identifier(model: str) -> str:
    path = Path(model).expanduser()
    if path.is_file():
        return str(path.absolute())
    return str(path.resolve()) if path.exists() else model


def _entry_of(identifier: str, pipeline: DiffusionPipeline, denoiser_name: str, known_as: str | None) -> ModelEntry:
    """Returns defaults for a model outside of the registry: of the known model it is built like, or of its pipeline."""
    is_file = os.path.isfile(identifier)
    place = {"name": identifier, "location": identifier, "architecture": None, "revision": None}
    place["source"] = "file" if is_file else "folder" if os.path.isdir(identifier) else "hub"
    if known_as is not None:
        return known_models()[known_as].model_copy(update=place)
    denoiser = getattr(pipeline, denoiser_name)
    num_steps = call_default(pipeline, "num_inference_steps") or 50
    size = getattr(denoiser.config, "sample_size", None)
    decoder = getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
    scale = 2 ** (len(decoder.config.get("block_out_channels", (1,))) - 1) if decoder is not None else 1
    return ModelEntry(
        **place,
        denoiser=type(denoiser).__name__,
        sampler=f"{type(pipeline.scheduler).__name__}, {num_steps} steps",
        num_steps=num_steps,
        guidance_scale=default_guidance(pipeline, denoiser) if takes_guidance(pipeline) else None,
        image_size=size * scale if isinstance(size, int) else None,
    )


def _is_module(pipeline: DiffusionPipeline, name: str) -> bool:
    return isinstance(getattr(pipeline, name, None), nn.Module)
