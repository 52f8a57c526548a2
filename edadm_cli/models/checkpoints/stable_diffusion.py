"""Single-file Stable Diffusion checkpoints, converted by diffusers with configurations that ship here: offline."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edadm_cli.artifacts import save_json
from edadm_cli.errors import InputError
from edadm_cli.models.architecture import Architecture, find_class
from edadm_cli.models.checkpoints.accounting import (
    DENOISER,
    FIRST_STAGE,
    TensorAccount,
    autoencoder_places,
    denoiser_places,
    empty_module,
)
from edadm_cli.models.checkpoints.reading import inert_globals
from edadm_cli.models.containment import no_network
from edadm_cli.models.from_folder import first_sentence
from edadm_cli.models.tokenizers import clip_tokenizer

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_TEXT = {
    "cond_stage_model.transformer.": "sd15",
    "cond_stage_model.model.": "sd21",
    "conditioner.embedders.1.": "sdxl",
}


def known_as(state: Mapping[str, Tensor]) -> str | None:
    """The known model that a Stable Diffusion checkpoint is built like, by its text encoder."""
    if not any(name.startswith(DENOISER) for name in state):
        return None
    return next((model for prefix, model in _TEXT.items() if any(name.startswith(prefix) for name in state)), None)


def require_fit(path: Path, state: Mapping[str, Tensor], architecture: Architecture) -> None:
    """Check denoiser and autoencoder of a checkpoint against an architecture, tensor by tensor.

    Raises:
        InputError: Tensors are missing, left over, misshapen or not finite.
    """
    checked = {name: tensor for name, tensor in state.items() if name.startswith((DENOISER, FIRST_STAGE))}
    account = TensorAccount(path, checked, averaged=False, heads_first=True)
    for name, places in (("unet", denoiser_places), ("vae", autoencoder_places)):
        module = empty_module(architecture, name)
        account.collect(module, places(module))
    account.require_all_fit()


def convert(path: Path, architecture: Architecture, dtype: torch.dtype) -> DiffusionPipeline:
    """Build the pipeline of a checkpoint.

    Raises:
        InputError: Diffusers cannot convert it, or its text encoder lacks tensors.
    """
    pipeline_class = find_class(architecture.pipeline)
    with tempfile.TemporaryDirectory() as folder:
        write_configs(architecture, Path(folder))
        try:
            with inert_globals(), no_network():
                pipeline: DiffusionPipeline = pipeline_class.from_single_file(
                    str(path), config=folder, local_files_only=True, torch_dtype=dtype, **architecture.options
                )
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            raise InputError(f"{path} cannot be loaded as {architecture.pipeline}: {first_sentence(error)}") from error
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            _require_whole(path, name, part)
    return pipeline


def write_configs(architecture: Architecture, folder: Path) -> None:
    """Write a pipeline's index, configurations and tokenizers, as a diffusers folder without weights."""
    index: dict[str, Any] = {"_class_name": architecture.pipeline}
    for name in architecture.components:
        cls = architecture.component_class(name)
        index[name] = [cls.__module__.partition(".")[0], cls.__name__]
        config = architecture.config(name)
        if issubclass(cls, nn.Module):
            kind = {"architectures": [cls.__name__]} if index[name][0] == "transformers" else {}
            model_type = getattr(getattr(cls, "config_class", None), "model_type", None)
            named = {**kind, "model_type": model_type} if model_type else {"_class_name": cls.__name__}
            _save(folder / name / "config.json", {**named, **config})
        elif hasattr(cls, "set_timesteps"):
            _save(folder / name / "scheduler_config.json", {"_class_name": cls.__name__, **config})
        else:
            clip_tokenizer(**config).save_pretrained(folder / name)
    _save(folder / "model_index.json", index)


def _save(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_json(path, content)


def _require_whole(path: Path, name: str, module: nn.Module) -> None:
    for own, tensor in module.named_parameters():
        if tensor.is_meta:
            raise InputError(f"{path} lacks the tensor of '{own}' of its {name}.")
        if not bool(tensor.isfinite().all()):
            raise InputError(f"{path}: '{own}' of its {name} holds values that are not finite (NaN or infinity).")
