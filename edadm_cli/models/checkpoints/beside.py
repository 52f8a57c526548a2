"""Builds a pipeline from a checkpoint file that holds only a denoiser and the diffusers folder beside it.

For example, `flux.safetensors` belongs to the folder `flux/`. The folder's `model_index.json` names the pipeline, its
`transformer/config.json` (or `unet/config.json`) describes the denoiser that the file holds, and it holds all other
components. Nothing is downloaded. diffusers converts the names of the tensors, for the classes that its
`from_single_file` supports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edadm_cli.errors import EdadmError, InputError
from edadm_cli.models.architecture import DENOISER_NAMES
from edadm_cli.models.checkpoints.accounting import DENOISER, is_finite
from edadm_cli.models.quiet import library_warnings
from edadm_cli.models.sources.containment import bounded_size, no_network, no_questions
from edadm_cli.models.sources.files import INDEX_NAME
from edadm_cli.models.sources.folder import Component, read_folder
from edadm_cli.models.sources.from_folder import empty_module, first_sentence, load_folder

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_LOADER = "diffusers.loaders.single_file_model"
_UNUSED = "were not used when initializing"
_CHANGING = ("lora", "hada_", "lokr_", "scale_weight", "weight_scale", "absmax", "quant_state", ".diff", ".alpha")
"""Parts of the names of tensors that change what other tensors mean: adapters, and scales of quantized weights."""


@dataclass(frozen=True)
class CompletedFile:
    """Holds a pipeline that was built from a file and a folder.

    Attributes:
        pipeline: The pipeline, on the CPU.
        fingerprint: The hash of the folder's files, without the denoiser's weights.
        remarks: A sentence that says which tensors of a denoiser were not used.
    """

    pipeline: DiffusionPipeline
    fingerprint: str
    remarks: tuple[str, ...] = ()


def folder_beside(path: Path) -> Path | None:
    """Returns the diffusers folder whose name is that of the file without its suffix; `None` if there is none."""
    folder = path.with_suffix("")
    return folder if (folder / INDEX_NAME).is_file() else None


def complete(path: Path, state: Mapping[str, Tensor], folder: Path, dtype: torch.dtype) -> CompletedFile:
    """Builds the pipeline of a folder around the denoiser of a file.

    Args:
        path: The file, for messages.
        state: The tensors of the file by name.
        folder: The diffusers folder with all other components.
        dtype: The element type of the floating-point weights.

    Raises:
        InputError: The folder cannot be loaded, or the file does not hold the denoiser that the folder describes.
    """
    source = read_folder(folder, weights_of_denoiser=False)
    component = next((part for part in source.components if part.name in DENOISER_NAMES), None)
    if component is None:
        raise InputError(f"{folder} has neither a 'unet' nor a 'transformer', so it does not say what {path} holds.")
    with no_questions(), no_network():
        denoiser, remarks = _convert(path, state, component, dtype)
    return CompletedFile(load_folder(source, dtype, {component.name: denoiser}), source.fingerprint(), remarks)


def _convert(
    path: Path, state: Mapping[str, Tensor], component: Component, dtype: torch.dtype
) -> tuple[nn.Module, tuple[str, ...]]:
    """Returns the denoiser of a file, and a sentence on the tensors that were not used."""
    loader: Any = component.cls
    if not hasattr(loader, "from_single_file"):
        raise InputError(
            f"diffusers does not convert single files of {component.cls.__name__}, so {path} is not loaded.",
            hint="give --model a diffusers folder with all weights",
        )
    state, extra = _without_extra(state, component, dtype)
    prefix = DENOISER if any(name.startswith("input_blocks.") for name in state) else ""  # diffusers expects it
    wide = {prefix + name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
    try:
        size = bounded_size(component.descriptions[0], state.values())
        with component.staged() as place, size, library_warnings(_LOADER) as warnings:
            module: nn.Module = loader.from_single_file(wide, config=str(place), local_files_only=True, dtype=dtype)
    except (EdadmError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise InputError(
            f"{path} does not hold the {component.cls.__name__} that {component.folder} describes: "
            f"{first_sentence(error)}"
        ) from error
    for name, tensor in module.named_parameters():
        if tensor.is_meta:
            raise InputError(f"{path} lacks the tensor '{name}', which {component.folder} describes.")
        if not is_finite(tensor):
            raise InputError(f"{path}: the tensor '{name}' holds values that are not finite (NaN or infinity).")
    if len(wide) < len(state):  # diffusers takes out what it converts, for FLUX, Stable Diffusion 3 and others
        extra += sorted(wide)
    for warning in warnings:
        if _UNUSED in warning:
            extra += warning.partition("['")[2].removesuffix("']").split(", ")
    return module, (_unused(path, extra),) if extra else ()


def _without_extra(
    state: Mapping[str, Tensor], component: Component, dtype: torch.dtype
) -> tuple[Mapping[str, Tensor], list[str]]:
    """Returns the tensors of a denoiser with diffusers' names alone, and the names of those beside them.

    diffusers takes a file with more tensors than the denoiser has for one with other names. Such files are returned as
    they are.
    """
    with bounded_size(component.descriptions[0], state.values()):
        names = set(empty_module(component, dtype).state_dict())
    if not names <= state.keys():
        return state, []
    return {name: tensor for name, tensor in state.items() if name in names}, sorted(state.keys() - names)


def _unused(path: Path, names: Sequence[str]) -> str:
    """Returns a sentence on the tensors that a denoiser does not have.

    Raises:
        InputError: They would change it.
    """
    changing = next((name for name in names if any(mark in name for mark in _CHANGING)), None)
    if changing is not None:
        raise InputError(
            f"{path} holds the tensor '{changing}', which changes the denoiser and is not understood.",
            hint="merge it into the weights, or give --model a file without it",
        )
    count = f"{len(names)} tensors" if len(names) > 1 else "a tensor"
    return f"{path} holds {count} that the denoiser does not have, such as '{names[0]}'; the rest is used."
