"""A pipeline built from a checked diffusers folder, part by part: diffusers' own loader also looks for code beside a
model.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edadm_cli.errors import EdadmError, InputError
from edadm_cli.models.folder import Component, PipelineFolder

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_LONGEST_REASON = 400  # characters of another library's error


def load_folder(folder: PipelineFolder, dtype: torch.dtype) -> DiffusionPipeline:
    """Build the pipeline of a folder.

    Raises:
        InputError: A part cannot be loaded, lacks a tensor, or holds values that are not finite.
    """
    parts = {component.name: _load_component(component, dtype) for component in folder.components}
    try:
        return folder.pipeline_class(**folder.options, **parts)
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{folder.path} has no working {folder.pipeline_class.__name__}: {first_sentence(error)}"
        ) from error


def _load_component(component: Component, dtype: torch.dtype) -> Any:
    if component.is_module:
        return _load_module(component, dtype)
    loader: Any = component.cls
    try:
        return loader.from_pretrained(component.folder, local_files_only=True)
    except Exception as error:
        raise InputError(
            f"{component.folder} cannot be loaded as {component.cls.__name__}: {first_sentence(error)}"
        ) from error


def _load_module(component: Component, dtype: torch.dtype) -> nn.Module:
    from transformers import PreTrainedModel

    where = component.weights[0] if len(component.weights) == 1 else component.folder
    loader: Any = component.cls
    try:
        module, info = loader.from_pretrained(
            component.folder,
            use_safetensors=True,
            variant=component.variant,
            local_files_only=True,
            output_loading_info=True,
            **{"dtype" if issubclass(component.cls, PreTrainedModel) else "torch_dtype": dtype},
        )
    except (EdadmError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise InputError(f"{where} cannot be loaded as {component.cls.__name__}: {first_sentence(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(f"{where} lacks the tensor '{missing[0]}', which {component.cls.__name__} needs.")
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{where}: the tensor '{name}' holds values that are not finite (NaN or infinity).")
    return module


def first_sentence(error: BaseException) -> str:
    """What another library says went wrong, on one line and not at length."""
    text = " ".join(str(error).split()) or type(error).__name__
    sentence = re.split(r"\.\s+(?=[A-Z])", text, maxsplit=1)[0][:_LONGEST_REASON]
    return sentence if sentence.endswith(".") else f"{sentence}."
