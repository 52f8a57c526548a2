"""Opens a denoiser of a folder, or one with random weights, without its weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from edadm_cli.artifacts import read_tensor_header
from edadm_cli.models.architecture import (
    DENOISER_NAMES,
    FURTHER_DENOISERS,
    WEIGHTS_VERSION,
    Architecture,
    load_architecture,
)
from edadm_cli.models.checkpoints.accounting import empty_module as empty_architecture
from edadm_cli.models.quiet import quiet_libraries
from edadm_cli.models.random_models import random_bytes, random_readers
from edadm_cli.models.registry import ModelEntry
from edadm_cli.models.sources.containment import no_questions
from edadm_cli.models.sources.folder import PipelineFolder, read_folder
from edadm_cli.models.sources.from_folder import empty_module
from edadm_cli.models.sources.locating import Location, files_of, is_random
from edadm_cli.models.stored import Reader, file_readers, place_stored


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
    if is_random(model, entry):
        return stored_architecture(load_architecture(entry.location), entry.weights_seed)
    path, _ = files_of(model, entry)
    if path.is_file():
        return None
    folder = read_folder(path)
    names = [name] if name else denoisers_of(folder)
    return stored_component(folder, names[0], torch.float32) if names else None


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


def stored_architecture(architecture: Architecture, seed: int) -> StoredDenoiser:
    """Opens the denoiser of an architecture, whose random weights are made whenever they are used."""
    module = empty_architecture(architecture, architecture.denoiser_name)
    readers = random_readers(module, architecture, seed)
    fingerprint = partial(architecture.fingerprint, seed, WEIGHTS_VERSION)
    return StoredDenoiser(architecture.denoiser_name, module, readers, fingerprint)


def denoisers_of(folder: PipelineFolder) -> list[str]:
    """Returns the names of a folder's denoisers, the first one first."""
    modules = {part.name for part in folder.components if part.is_module}
    return [name for name in (*DENOISER_NAMES, *FURTHER_DENOISERS) if name in modules]


def stored_component(folder: PipelineFolder, name: str, dtype: torch.dtype) -> StoredDenoiser | None:
    """Opens a denoiser of a folder; `None` where it has no weights, or tensors with names of earlier diffusers."""
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
