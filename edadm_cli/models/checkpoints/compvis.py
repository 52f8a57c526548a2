"""Converts CompVis latent-diffusion checkpoints into pipelines of diffusers.

References:
    Latent Diffusion, arXiv 2112.10752; attention blocks as in Guided Diffusion, arXiv 2105.05233.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edadm_cli.errors import InputError
from edadm_cli.models.architecture import Architecture, find_class
from edadm_cli.models.checkpoints.accounting import (
    DENOISER,
    EMA,
    LABELS,
    TensorAccount,
    autoencoder_places,
    denoiser_places,
    empty_module,
)
from edadm_cli.models.checkpoints.compvis_config import CONFIG_NAME, NUM_LABELS, CompVisModel, known_model, read_config

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_INPUT = f"{DENOISER}input_blocks.0.0.weight"
_SCALE = "scale_factor"


def is_latent_diffusion(state: Mapping[str, Tensor]) -> bool:
    """Returns whether a checkpoint is a CompVis model without a text encoder."""
    conditions = [name for name in state if name.startswith((LABELS, "conditioner."))]
    return _INPUT in state and all(name == f"{LABELS}embedding.weight" for name in conditions)


def describe(path: Path, state: Mapping[str, Tensor]) -> CompVisModel:
    """Returns what a checkpoint holds, from the configuration beside it or else from the list of known checkpoints.

    Raises:
        InputError: The configuration cannot be used, or there is none and the checkpoint is not a known one.
    """
    config = path.with_name(CONFIG_NAME)
    if config.is_file():
        return read_config(config)
    model = known_model(tuple(state[_INPUT].shape[:2]))
    if model is None:
        raise InputError(
            f"{path} is none of the latent diffusion checkpoints that are known without a configuration.",
            hint=f"put the model's {CONFIG_NAME} beside it",
        )
    return _with_labels(model, state)


def _with_labels(model: CompVisModel, state: Mapping[str, Tensor]) -> CompVisModel:
    """Returns a known model with as many classes as the checkpoint has."""
    embedding = state.get(f"{LABELS}embedding.weight")
    name = model.architecture.denoiser_name
    cls, config = model.architecture.components[name]
    if embedding is None or not cls.endswith("ClassConditionalUNet") or embedding.shape[0] == NUM_LABELS:
        return model
    components = {**model.architecture.components, name: (cls, {**config, "num_labels": embedding.shape[0]})}
    return replace(model, architecture=model.architecture.model_copy(update={"components": components}))


def convert(path: Path, state: Mapping[str, Tensor], model: CompVisModel, dtype: torch.dtype) -> DiffusionPipeline:
    """Builds the pipeline of a checkpoint.

    Args:
        path: The checkpoint, for messages.
        state: The tensors of the checkpoint by name.
        model: What the checkpoint holds; see `describe`.
        dtype: The element type of the weights.

    Raises:
        InputError: Tensors are missing, left over, misshapen or not finite.
    """
    architecture = _with_scale(path, model, state)
    averaged = model.use_ema and any(name.startswith(EMA) for name in state)
    source = TensorAccount(path, state, averaged, model.heads_first)
    denoiser_name = architecture.denoiser_name
    decoder_name = next(name for name in ("vqvae", "vae") if name in architecture.components)
    modules = {name: empty_module(architecture, name) for name in (denoiser_name, decoder_name)}
    tensors = {
        denoiser_name: source.collect(modules[denoiser_name], denoiser_places(modules[denoiser_name])),
        decoder_name: source.collect(modules[decoder_name], autoencoder_places(modules[decoder_name])),
    }
    source.require_all_fit()
    for name, module in modules.items():
        module.load_state_dict({key: tensor.to(dtype) for key, tensor in tensors[name].items()}, assign=True)
    scheduler = architecture.component_class("scheduler")(**architecture.config("scheduler"))
    pipeline: DiffusionPipeline = find_class(architecture.pipeline)(**modules, scheduler=scheduler)
    return pipeline


def _with_scale(path: Path, model: CompVisModel, state: Mapping[str, Tensor]) -> Architecture:
    """Returns the architecture with the checkpoint's scale of the latents, if the checkpoint holds one."""
    architecture = model.architecture
    if _SCALE not in state:
        if model.scale_in_checkpoint:
            raise InputError(f"{path} lacks the tensor '{_SCALE}'.")
        return architecture
    components = dict(architecture.components)
    name = "vqvae" if "vqvae" in components else "vae"
    cls, config = components[name]
    components[name] = (cls, {**config, "scaling_factor": float(state[_SCALE])})
    return architecture.model_copy(update={"components": components})
