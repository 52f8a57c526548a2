"""Recognises what a checkpoint file holds if it is not a whole pipeline, and makes the error that says so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from edadm_cli.errors import InputError
from edadm_cli.models.checkpoints.accounting import DENOISER, FIRST_STAGE

_LORA = (
    "lora_unet_",
    "lora_te",
    "lora_transformer_",
    ".lora_A.",
    ".lora_B.",
    ".lora_down.",
    ".lora_up.",
    ".lora.down.",
)
_CONTROL = ("control_model.", "controlnet_cond_embedding.", "controlnet_blocks.", "input_hint_block.")
_AUTOENCODER = (FIRST_STAGE, "encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_FLUX, _SD3 = "double_blocks.0.", "joint_blocks.0."
_DIFFUSERS = ("down_blocks.0.", "transformer_blocks.0.", "single_transformer_blocks.0.", "blocks.0.", "layers.0.")
_LORA_HINT = "quantize its model, and then: edadm export --lora FILE (docs/lora.md)"


def is_lora(state: Mapping[str, Tensor]) -> bool:
    """Returns whether a file holds a LoRA: low-rank changes of a model, and not a model."""
    names = [name.removeprefix(DENOISER) for name in state]
    return any(_LORA[0] in name or name.startswith(_LORA[:3]) or any(part in name for part in _LORA) for name in names)


def has_autoencoder(state: Mapping[str, Tensor]) -> bool:
    """Returns whether a file holds an autoencoder under the tensor names that a whole pipeline uses."""
    return any(name.startswith(FIRST_STAGE) for name in state)


def holds_denoiser_only(state: Mapping[str, Tensor]) -> bool:
    """Returns whether a file holds a denoiser and no autoencoder, with the original or with diffusers' tensor names."""
    if has_autoencoder(state):
        return False
    names = [name.removeprefix(DENOISER).removeprefix("model.") for name in state]
    starts = ("input_blocks.0.", _FLUX, _SD3, *_DIFFUSERS)
    return any(name.startswith(starts) for name in names)


def refusal(path: Path, state: Mapping[str, Tensor]) -> InputError:
    """Returns the error for a file that is not a whole pipeline; it says what the file holds and what to do."""
    bare = [name.removeprefix(DENOISER) for name in state]
    if is_lora(state):
        return InputError(f"{path} is a LoRA, which changes a model and is not one.", hint=_LORA_HINT)
    if _starts(state, _CONTROL):
        return InputError(
            f"{path} is a ControlNet, which guides a model and is not one.", hint="give --model the pipeline's folder"
        )
    if _starts(bare, (_FLUX,)):
        return _without_folder(path, "the transformer of a Flux model")
    if _starts(bare, (_SD3,)):
        return _without_folder(path, "the transformer of a Stable Diffusion 3 model")
    if any(name.startswith("conditioner.embedders.0.model.") for name in state):
        return _without_folder(path, "a Stable Diffusion XL refiner")
    if holds_denoiser_only(state):
        return _without_folder(path, "a denoiser")
    if all(name.startswith(_AUTOENCODER) for name in state):
        return InputError(
            f"{path} is an autoencoder (VAE) without a denoiser, so there is nothing to quantize.",
            hint="give --model the whole pipeline",
        )
    return InputError(
        f"{path} holds neither a Stable Diffusion (1, 2 or XL) nor a CompVis latent diffusion model; "
        f"its first tensor is '{min(state)[:80]}'.",
        hint="give --model a diffusers folder",
    )


def no_autoencoder(path: Path, what: str) -> InputError:
    """Returns the error for a Stable Diffusion file without its autoencoder."""
    return InputError(
        f"{path} is a {what} without an autoencoder (VAE): it has no tensor '{FIRST_STAGE}...'.",
        hint=f"take a file that includes the VAE, or {_folder_hint(path)}",
    )


def _without_folder(path: Path, what: str) -> InputError:
    return InputError(
        f"{path} holds {what} and not a whole pipeline that is converted without its configuration.",
        hint=_folder_hint(path),
    )


def _folder_hint(path: Path) -> str:
    return f"put a diffusers folder with its other components beside it: {path.with_suffix('')}/model_index.json"


def _starts(names: Iterable[str], prefixes: tuple[str, ...]) -> bool:
    return any(name.startswith(prefixes) for name in names)
