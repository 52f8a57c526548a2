"""The families of diffusers' UNets, and of the two UNets of this package that converted CompVis checkpoints use."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from edadm_cli.models.families.family import Call, DenoiserFamily, UnitKind
from edadm_cli.models.families.values import ExampleValues

BLOCKS: dict[str, UnitKind] = {
    "ResnetBlock2D": "residual",
    "ResnetBlockCondNorm2D": "residual",
    "BasicTransformerBlock": "transformer",
    "Attention": "attention",
}


def _unconditional(denoiser: nn.Module, values: ExampleValues) -> Call:
    kwargs: dict[str, Any] = {}
    if values.config.num_class_embeds:
        kwargs["class_labels"] = values.labels(values.config.num_class_embeds)
    return (values.latents(), values.scalar_timestep()), kwargs


def _labelled(denoiser: nn.Module, values: ExampleValues) -> Call:
    num_classes: Any = denoiser.num_classes
    return (values.latents(),), {"timestep": values.timestep(), "class_labels": values.labels(num_classes)}


def _conditional(denoiser: nn.Module, values: ExampleValues) -> Call:
    config = values.config
    states = values.normal(values.CLIP_TOKENS, config.encoder_hid_dim or config.cross_attention_dim)
    kwargs: dict[str, Any] = {"encoder_hidden_states": states}
    if config.addition_embed_type == "text_time":
        ids = _size_conditions(config, values.size)
        pooled = config.projection_class_embeddings_input_dim - len(ids) * config.addition_time_embed_dim
        time_ids = torch.tensor(ids, dtype=values.dtype, device=values.device).repeat(values.rows, 1)
        kwargs["added_cond_kwargs"] = {"text_embeds": values.normal(pooled), "time_ids": time_ids}
    if config.time_cond_proj_dim is not None:
        kwargs["timestep_cond"] = values.normal(config.time_cond_proj_dim)
    if config.num_class_embeds:
        kwargs["class_labels"] = values.labels(config.num_class_embeds)
    return (values.latents(), values.scalar_timestep()), kwargs


def _size_conditions(config: Any, size: tuple[int, int]) -> list[int]:
    """Returns the original size, the crop offset and the target size, in pixels.

    A refiner of SDXL takes an aesthetic score in place of the target size. It is recognised by the width of its pooled
    text vector, which is that of SDXL's second text encoder: 1280 channels.
    """
    pixels = [8 * size[0], 8 * size[1]]
    is_refiner = config.projection_class_embeddings_input_dim - 5 * config.addition_time_embed_dim == 1280
    return [*pixels, 0, 0, 6] if is_refiner else [*pixels, 0, 0, *pixels]


UNCONDITIONAL = DenoiserFamily(
    name="unet",
    denoisers=("UNet2DModel",),
    blocks=BLOCKS,
    block_lists=(),
    example_call=_unconditional,
    float32_pipelines=("LDMPipeline",),
)
CONDITIONAL = DenoiserFamily(
    name="conditional unet",
    denoisers=("UNet2DConditionModel",),
    blocks=BLOCKS,
    block_lists=(),
    conditional_first=("StableDiffusionInstructPix2PixPipeline", "StableDiffusionXLInstructPix2PixPipeline"),
    calls_per_step=1,
    example_call=_conditional,
)
LABELLED = DenoiserFamily(
    name="class-conditional unet",
    denoisers=("ClassConditionalUNet",),
    blocks=BLOCKS,
    block_lists=(),
    conditional_first=("DiTPipeline",),
    calls_per_step=1,
    example_call=_labelled,
)
VIDEO = DenoiserFamily(
    name="video unet",
    denoisers=("UNet3DConditionModel", "UNetMotionModel", "UNetSpatioTemporalConditionModel", "I2VGenXLUNet"),
    blocks=BLOCKS
    | {
        "SpatioTemporalResBlock": "residual",
        "TemporalConvLayer": "residual",
        "TemporalBasicTransformerBlock": "transformer",
        "FreeNoiseTransformerBlock": "transformer",
    },
    block_lists=(),
    joined_arguments=("encoder_hidden_states",),
    calls_per_step=1,
)
KANDINSKY3 = DenoiserFamily(
    name="kandinsky 3",
    denoisers=("Kandinsky3UNet",),
    blocks={"Kandinsky3ResNetBlock": "residual", "Kandinsky3AttentionBlock": "transformer"},
    block_lists=(),
    calls_per_step=1,
)
FAMILIES = (UNCONDITIONAL, CONDITIONAL, LABELLED, VIDEO, KANDINSKY3)
