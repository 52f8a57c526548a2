"""Loads a pipeline: by known name, from a diffusers folder, a checkpoint file or the hub, or with random weights."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from edadm_cli.artifacts import ModelRef, read_tensor_header
from edadm_cli.errors import InputError, MachineError, UsageError
from edadm_cli.models.architecture import (
    DENOISER_NAMES,
    FURTHER_DENOISERS,
    Architecture,
    find_class,
    load_architecture,
)
from edadm_cli.models.checkpoints.accounting import empty_module as empty_architecture
from edadm_cli.models.checkpoints.opening import open_checkpoint
from edadm_cli.models.containment import no_questions
from edadm_cli.models.families.registry import float32_pipelines
from edadm_cli.models.folder import INDEX_NAME, PipelineFolder, read_folder
from edadm_cli.models.from_folder import empty_module, load_folder
from edadm_cli.models.hub import download, looks_like_hub_id
from edadm_cli.models.loaded import LoadedModel as LoadedModel  # other modules import it from here
from edadm_cli.models.placement import Placement
from edadm_cli.models.quiet import quiet_libraries
from edadm_cli.models.random_models import (
    WEIGHTS_VERSION,
    build_random_pipeline,
    random_bytes,
    random_readers,
)
from edadm_cli.models.registry import ModelEntry, known_models
from edadm_cli.models.sampling import call_default, default_guidance, takes_guidance
from edadm_cli.models.shipped import shipped_folder
from edadm_cli.models.stored import Reader, file_readers, place_stored

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
class StoredDenoiser:
    """A denoiser whose weights are not in memory yet.

    Attributes:
        name: The name of the component.
        module: Its parameters are on the `meta` device.
        readers: A reader for each parameter.
        fingerprint: Returns the fingerprint of the model.
        float32: Names of modules that diffusers leaves in float32, whatever the denoiser is loaded in.
    """

    name: str
    module: nn.Module
    readers: dict[str, Reader]
    fingerprint: Callable[[], str]
    float32: tuple[str, ...] = ()

    @property
    def num_parameters(self) -> int:
        """The number of all parameters."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def place(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Returns the denoiser, whose layers read their weights whenever they are used."""
        place_stored(self.module, self.readers, device, dtype, self.float32)
        return self.module


def open_stored(model: str, entry: ModelEntry, name: str = "") -> StoredDenoiser | None:
    """Opens a denoiser without its weights, for float32; `None` where they are in a single file or under other names.

    Args:
        model: The model.
        entry: Its defaults.
        name: The component, where a pipeline has several denoisers; by default the first one.

    Raises:
        InputError: The model is missing or broken.
    """
    if _is_random(model, entry):
        return _stored_architecture(load_architecture(entry.location), entry.weights_seed)
    path, _ = _locate(model, entry)
    if path.is_file():
        return None
    folder = read_folder(path)
    names = [name] if name else _denoisers_of(folder)
    return _stored_component(folder, names[0], torch.float32) if names else None


def weight_bytes(location: Location, dtype: torch.dtype) -> dict[str, int]:
    """Returns the bytes that the weights of each component take in an element type; none for a single file.

    Raises:
        InputError: The model is broken.
    """
    if isinstance(location, Architecture):
        return random_bytes(location, dtype)
    path, _ = location
    if path.is_file():
        return {}
    return {
        part.name: dtype.itemsize
        * sum(math.prod(info.shape) for file in part.weights for info in read_tensor_header(file).values())
        for part in read_folder(path).components
        if part.weights
    }


_BY_HAND = {
    "compvis": ("a CompVis checkpoint", "unpack it there"),
    "assembled": ("a folder made of several models of the hub", "save its pipeline there (docs/models.md, 'Others')"),
}
Location = Architecture | tuple[Path, str | None]
"""Where a model is: the architecture of random weights, or a folder or file and its revision on the hub."""


def locate(model: str) -> Location:
    """Finds a model's files; one of the hub is downloaded, or found in the cache.

    Args:
        model: A known name, a diffusers folder, a checkpoint file, or a hub id.

    Raises:
        InputError: There is no such model.
    """
    entry = known_models().get(model)
    if entry is not None and _is_random(model, entry):
        return load_architecture(entry.location)
    return _locate(model, entry)


def _is_random(model: str, entry: ModelEntry) -> bool:
    return entry.name == model and entry.source == "random"


def _stored_architecture(architecture: Architecture, seed: int) -> StoredDenoiser:
    module = empty_architecture(architecture, architecture.denoiser_name)
    readers = random_readers(module, architecture, seed)
    fingerprint = partial(architecture.fingerprint, seed, WEIGHTS_VERSION)
    return StoredDenoiser(architecture.denoiser_name, module, readers, fingerprint)


def _denoisers_of(folder: PipelineFolder) -> list[str]:
    """Returns the names of a folder's denoisers, the first one first."""
    modules = {part.name for part in folder.components if part.is_module}
    return [name for name in (*DENOISER_NAMES, *FURTHER_DENOISERS) if name in modules]


def _stored_component(folder: PipelineFolder, name: str, dtype: torch.dtype) -> StoredDenoiser | None:
    component = next((part for part in folder.components if part.name == name), None)
    if component is None or not component.weights:
        return None
    with quiet_libraries(), no_questions():
        module = empty_module(component, dtype)
    readers = file_readers(component.weights)
    if any(name not in readers for name, _ in module.named_parameters()):  # diffusers' loader knows older names
        return None
    float32: str | list[str] = getattr(component.cls, "_keep_in_fp32_modules", None) or []
    names = (float32,) if isinstance(float32, str) else tuple(float32)
    return StoredDenoiser(component.name, module, readers, folder.fingerprint, names)


@dataclass(frozen=True)
class _Source:
    """A pipeline as it comes from its source, before the entry's scheduler is applied."""

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
    if entry is not None and _is_random(model, entry):
        architecture, seed = load_architecture(entry.location), entry.weights_seed
        fingerprint = architecture.fingerprint(seed, WEIGHTS_VERSION)
        ready = {}
        if stored:
            ready[architecture.denoiser_name] = _stored_architecture(architecture, seed).place(device, dtype)
        pipeline = build_random_pipeline(architecture, seed, dtype, device, ready)
        return _Source(pipeline, fingerprint, has_stored_denoiser=stored)
    path, revision = location if isinstance(location, tuple) else _locate(model, entry)
    if path.is_file():
        checkpoint = open_checkpoint(path, dtype)
        return _Source(
            checkpoint.pipeline, checkpoint.fingerprint, known_as=checkpoint.known_as, remarks=checkpoint.remarks
        )
    folder = read_folder(path)
    denoisers = [_stored_component(folder, name, dtype) for name in (_denoisers_of(folder) if stored else ())]
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


def _locate(model: str, entry: ModelEntry | None) -> tuple[Path, str | None]:
    """Returns the folder or file of a model, and its revision on the hub."""
    if entry is not None and entry.name == model and entry.source == "shipped":
        return shipped_folder(entry.location), None
    if entry is not None and entry.name == model and entry.source == "hub":
        return download(entry.location, entry.revision)
    if not model.strip():
        raise UsageError("--model is empty.", hint="edadm models")
    path = Path(model).expanduser()
    if entry is not None and entry.name == model and entry.source in _BY_HAND:
        path = Path(entry.location)
        if not path.exists():
            what, remedy = _BY_HAND[entry.source]
            raise InputError(
                f"The weights of {model} are {what}, which was expected at {path} and is not there.",
                hint=f"{remedy}, give --model its path, or take {model}-random",
            )
    if path.is_dir():
        if not (path / INDEX_NAME).is_file():
            has_config = (path / "config.json").is_file()
            raise InputError(
                f"{path} is not a diffusers pipeline: it has no {INDEX_NAME}.",
                hint=f"give --model the folder of the whole pipeline, which has {INDEX_NAME}" if has_config else None,
            )
        return path.resolve(), None
    if path.is_file():
        return path.absolute(), None  # a link keeps its name: in the hub's cache, the file behind it has none
    if looks_like_hub_id(model):
        return download(model, None)
    alike = get_close_matches(model, known_models())
    raise InputError(
        f"There is no model '{model}': it is neither a known name, nor a folder or a checkpoint file, nor a hub id "
        "such as owner/name.",
        hint=f"edadm models lists the known names{f', such as {alike[0]}' if alike else ''}",
    )


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
