"""Converts single-file Stable Diffusion checkpoints with diffusers.

It needs no network, because the configurations ship with this package.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edadm_cli.artifacts import save_json
from edadm_cli.errors import InputError
from edadm_cli.models.architecture import Architecture, find_class
from edadm_cli.models.checkpoints.accounting import (
    DENOISER,
    EMA,
    FIRST_STAGE,
    TensorAccount,
    autoencoder_places,
    denoiser_places,
    empty_module,
    is_finite,
    listed,
)
from edadm_cli.models.checkpoints.kinds import no_autoencoder
from edadm_cli.models.checkpoints.reading import inert_globals
from edadm_cli.models.sources.containment import no_network
from edadm_cli.models.sources.from_folder import first_sentence
from edadm_cli.models.tokenizers import clip_tokenizer

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_TEXT = {
    "cond_stage_model.transformer.": "sd15",
    "cond_stage_model.model.": "sd21",
    "conditioner.embedders.1.": "sdxl",
}
_TITLES = {"sd15": "Stable Diffusion 1", "sd21": "Stable Diffusion 2", "sdxl": "Stable Diffusion XL"}
_INPUT = f"{DENOISER}input_blocks.0.0.weight"
# The pipeline by the number of the denoiser's input channels. Beside the latents (4) they hold an image (4 more), or an
# image and a mask (5 more).
_BY_CHANNELS = {
    9: {"StableDiffusionPipeline": "StableDiffusionInpaintPipeline"}
    | {"StableDiffusionXLPipeline": "StableDiffusionXLInpaintPipeline"},
    8: {"StableDiffusionPipeline": "StableDiffusionInstructPix2PixPipeline"}
    | {"StableDiffusionXLPipeline": "StableDiffusionXLInstructPix2PixPipeline"},
}
# Marker tensors: their presence, not their values, marks a v-prediction model and a rescaled noise schedule.
_V_PREDICTION, _ZERO_SNR = "v_pred", "ztsnr"
_OTHER_SCHEDULES = ("edm_vpred.", "edm_mean", "edm_std")
_KNOWN_PREFIXES = (DENOISER, FIRST_STAGE, EMA, "cond_stage_model.", "conditioner.", "denoiser.", "loss.")
# Prefixes of tensors that change what a model computes, and that diffusers would not load into the pipeline.
_CHANGES_OF_A_MODEL = ("lora_", "control_model.", "embedding_manager.", "hypernetwork")


@dataclass(frozen=True)
class StableDiffusionFile:
    """Describes the pipeline that a checkpoint holds.

    Attributes:
        architecture: The classes and configurations of the pipeline in diffusers.
        markers: The names of the marker tensors that set the noise schedule. They are part of the fingerprint.
        remarks: Sentences that say what was assumed and which tensors were not used.
    """

    architecture: Architecture
    markers: tuple[str, ...]
    remarks: tuple[str, ...]


def known_as(state: Mapping[str, Tensor]) -> str | None:
    """Returns the known model that has the architecture of a Stable Diffusion checkpoint, by its text encoder.

    The result is `None` for a checkpoint without a denoiser or without one of the known text encoders.
    """
    if not any(name.startswith(DENOISER) for name in state):
        return None
    return next((model for prefix, model in _TEXT.items() if any(name.startswith(prefix) for name in state)), None)


def describe(path: Path, state: Mapping[str, Tensor], name: str, architecture: Architecture) -> StableDiffusionFile:
    """Describes a checkpoint that has the architecture of a known model, and checks each of its tensors.

    Args:
        path: The checkpoint, for messages.
        state: The tensors of the checkpoint by name.
        name: The known model; see `known_as`.
        architecture: The architecture of the known model.

    Raises:
        InputError: Tensors are missing, left over, misshapen or not finite, or belong to another kind of model.
    """
    if not any(tensor.startswith(FIRST_STAGE) for tensor in state):
        raise no_autoencoder(path, f"{_TITLES[name]} checkpoint")
    architecture = _with_input(path, state, architecture)
    architecture, markers = _with_schedule(path, state, architecture)
    _require_fit(path, state, architecture)
    remarks = [*_left_aside(path, state)]
    if name == "sd21" and not markers and architecture.config("unet")["in_channels"] == 4:
        remarks.append(
            f"{path.name} is taken for a v-prediction model, as the 768-pixel versions of Stable Diffusion 2 are; "
            "the base versions need --prediction-type epsilon."
        )
    return StableDiffusionFile(architecture, markers, tuple(remarks))


def _with_input(path: Path, state: Mapping[str, Tensor], architecture: Architecture) -> Architecture:
    """Returns the architecture with the file's number of input channels and the pipeline that supplies them."""
    weight = state.get(_INPUT)
    channels = architecture.config("unet")["in_channels"]
    if weight is None or weight.ndim != 4 or weight.shape[1] == channels:
        return architecture
    pipeline = _BY_CHANNELS.get(weight.shape[1], {}).get(architecture.pipeline)
    if pipeline is None:
        raise InputError(
            f"{path} has a denoiser with {weight.shape[1]} input channels; {channels} (text to image), 8 "
            "(InstructPix2Pix) and 9 (inpainting) are converted."
        )
    changed = _changed(architecture, "unet", {"in_channels": weight.shape[1]})
    if architecture.config("scheduler").get("prediction_type") == "v_prediction":
        changed = _changed(changed, "scheduler", {"prediction_type": "epsilon"})  # as Stable Diffusion 2's inpainting
    return changed.model_copy(update={"pipeline": pipeline})


def _with_schedule(
    path: Path, state: Mapping[str, Tensor], architecture: Architecture
) -> tuple[Architecture, tuple[str, ...]]:
    """Returns the architecture with the prediction type and noise schedule of the marker tensors, and their names."""
    other = next((name for name in sorted(state) if name.startswith(_OTHER_SCHEDULES)), None)
    if other is not None:
        raise InputError(f"{path} is marked by '{other}' as a model of the EDM noise schedule, which is not converted.")
    markers = tuple(name for name in (_V_PREDICTION, _ZERO_SNR) if name in state)
    if _V_PREDICTION in markers:
        architecture = _changed(architecture, "scheduler", {"prediction_type": "v_prediction"})
    if _ZERO_SNR in markers:
        scheduler, config = architecture.components["scheduler"]
        if scheduler.endswith("PNDMScheduler"):  # it cannot rescale its noise schedule
            config = {key: value for key, value in config.items() if key != "skip_prk_steps"} | {"clip_sample": False}
            architecture = _replaced(architecture, "scheduler", ("diffusers.DDIMScheduler", config))
        zero_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        architecture = _changed(architecture, "scheduler", zero_snr)
    return architecture, markers


def _left_aside(path: Path, state: Mapping[str, Tensor]) -> list[str]:
    """Returns a remark on the tensors that belong to no denoiser, autoencoder or text encoder, if there are any.

    Raises:
        InputError: Some of them change what the model computes.
    """
    others = sorted(name for name in state if "." in name and not name.startswith(_KNOWN_PREFIXES))
    changes = [name for name in (*others, *state) if name.startswith(_CHANGES_OF_A_MODEL)]
    if changes:
        raise InputError(
            f"{path} has tensors that change the model and that no pipeline of diffusers takes from a checkpoint: "
            f"{listed(sorted(set(changes)))}.",
            hint="merge or remove them first",
        )
    return [f"{path.name} has tensors that its model does not use: {listed(others)}."] if others else []


def _require_fit(path: Path, state: Mapping[str, Tensor], architecture: Architecture) -> None:
    """Checks the denoiser and the autoencoder of a checkpoint against an architecture, tensor by tensor."""
    checked = {name: tensor for name, tensor in state.items() if name.startswith((DENOISER, FIRST_STAGE))}
    account = TensorAccount(path, checked, averaged=False, heads_first=True)
    for name, places in (("unet", denoiser_places), ("vae", autoencoder_places)):
        module = empty_module(architecture, name)
        account.collect(module, places(module))
    account.require_all_fit()


def _changed(architecture: Architecture, name: str, change: dict[str, Any]) -> Architecture:
    cls, config = architecture.components[name]
    return _replaced(architecture, name, (cls, {**config, **change}))


def _replaced(architecture: Architecture, name: str, component: tuple[str, dict[str, Any]]) -> Architecture:
    return architecture.model_copy(update={"components": {**architecture.components, name: component}})


def convert(path: Path, architecture: Architecture, dtype: torch.dtype) -> DiffusionPipeline:
    """Builds the pipeline of a checkpoint.

    Raises:
        InputError: diffusers cannot convert it, or a component lacks tensors or holds values that are not finite.
    """
    pipeline_class = find_class(architecture.pipeline)
    with tempfile.TemporaryDirectory(prefix="edadm-") as folder:
        write_configs(architecture, Path(folder))
        file = Path(folder, f"checkpoint{path.suffix.lower()}")  # diffusers goes by the suffix
        file.symlink_to(path.resolve())
        try:
            with inert_globals(), no_network():
                pipeline: DiffusionPipeline = pipeline_class.from_single_file(
                    str(file), config=folder, local_files_only=True, dtype=dtype, **architecture.options
                )
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            reason = first_sentence(error).replace(str(file), str(path))
            raise InputError(f"{path} cannot be loaded as {architecture.pipeline}: {reason}") from error
    for name, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            _require_whole(path, name, module)
    return pipeline


def write_configs(architecture: Architecture, folder: Path) -> None:
    """Writes the index, the configurations and the tokenizers of a pipeline as a diffusers folder without weights."""
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


def _require_whole(path: Path, component: str, module: nn.Module) -> None:
    for name, tensor in module.named_parameters():
        if tensor.is_meta:
            raise InputError(f"{path} lacks the tensor of '{name}' of its {component}.")
        if not is_finite(tensor):
            raise InputError(f"{path}: '{name}' of its {component} holds values that are not finite (NaN or infinity).")
