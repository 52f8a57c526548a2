"""Builders of tiny FLUX and Chroma pipelines: one function per row of the table."""

from __future__ import annotations

from typing import Any

import diffusers as d

from tests.denoisers import parts
from tests.denoisers.unets import awake

_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


def _flux(name: str, **fields: Any) -> Any:
    texts = parts.clip(), parts.t5()
    transformer = d.FluxTransformer2DModel(
        **{
            "patch_size": 1,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 2,
            **_HEADS,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (4, 4, 8),
            "guidance_embeds": True,
            **fields,
        }
    )
    return parts.assembled(name, transformer, *texts)


def flux_dev() -> Any:
    return _flux("FluxPipeline")


def flux_kontext() -> Any:
    return _flux("FluxKontextPipeline")


def flux_fill() -> Any:
    return _flux("FluxFillPipeline", in_channels=16 + 16 + 4 * 64, out_channels=16)


def flux2_vae() -> Any:
    """The autoencoder of FLUX.2, with 4 latent channels."""
    return d.AutoencoderKLFlux2(
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _flux2(layers: int, is_distilled: bool) -> Any:
    text = parts.qwen3(layers=28, causal=True)
    transformer = d.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=layers,
        **_HEADS,
        joint_attention_dim=96,
        timestep_guidance_channels=256,
        axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=False,
    )
    scheduler = parts.flow(use_dynamic_shifting=True)
    return parts.assembled(
        "Flux2KleinPipeline", transformer, text, vae=flux2_vae(), scheduler=scheduler, is_distilled=is_distilled
    )


def flux2_klein() -> Any:
    return _flux2(2, is_distilled=True)


def flux2_base() -> Any:
    return _flux2(2, is_distilled=False)


def chroma() -> Any:
    text = parts.t5()
    transformer = d.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        **_HEADS,
        joint_attention_dim=32,
        axes_dims_rope=[4, 4, 8],
        approximator_num_channels=8,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    return parts.assembled("ChromaPipeline", transformer, text)


def controlnet_flux() -> Any:
    pipeline = flux_dev()
    control = d.FluxControlNetModel.from_transformer(
        pipeline.transformer, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
    )
    return d.FluxControlNetPipeline(**pipeline.components, controlnet=awake(control))
