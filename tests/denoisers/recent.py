"""Builders of tiny pipelines of recent denoisers for images: one function per row of the table."""

from __future__ import annotations

from typing import Any

import diffusers as d
import transformers as tr

from edadm_cli.models.random_models import initialize
from edadm_cli.models.tokenizers import letter_tokenizer
from tests.denoisers import flux, parts, videos

_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


def fibo() -> Any:
    transformer = d.BriaFiboTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        **_HEADS,
        joint_attention_dim=64,  # the last two states of the text encoder, side by side
        text_encoder_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    config = tr.SmolLM3Config(**parts.SMALL)  # its vocabulary has the token that stands for an empty prompt
    text = letter_tokenizer(model_max_length=64), tr.SmolLM3ForCausalLM(config)
    vae = d.AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    )
    return parts.assembled("BriaFiboPipeline", transformer, text, vae=vae)


def fibo2() -> Any:
    transformer = d.BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=96,  # three states of the text encoder, side by side
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=4,
        gist_min_text_len=4,
        gist_max_text_len=16,
        axes_dims=(4, 6, 6),
        axes_lens=(64, 64, 64),
    )
    _, encoder = parts.qwen3_vl(layers=36, causal=True)
    components = {"processor": parts.qwen3_vl_processor(), "text_encoder": encoder}
    return d.BriaFibo2Pipeline(transformer=transformer, scheduler=parts.flow(), vae=flux.flux2_vae(), **components)


def nucleus() -> Any:
    transformer = d.NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        **_HEADS,
        joint_attention_dim=32,
        axes_dims_rope=(8, 4, 4),
        dense_moe_strategy="leave_first_block_dense",
        num_experts=4,
        moe_intermediate_dim=32,
        mlp_ratio=6.0,  # inner widths are multiples of 128, rounded down
        capacity_factors=[2.0, 2.0],
    )
    initialize(transformer, 0)  # diffusers leaves the experts as the memory was
    _, encoder = parts.qwen3_vl(layers=8, causal=True)
    components = {"processor": parts.qwen3_vl_processor(), "text_encoder": encoder}
    return d.NucleusMoEImagePipeline(
        transformer=transformer, scheduler=parts.flow(), vae=parts.qwen_vae(), **components
    )


def qwen_image21() -> Any:
    channels = 8
    transformer = d.QwenImage21Transformer2DModel(
        in_channels=channels,
        out_channels=channels,
        num_layers=2,
        **_HEADS,
        context_in_dim=32,
        mlp_ratio=2,
        axes_dims_rope=(4, 6, 6),
    )
    vae = d.AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=channels,
        dim_mult=[1] * 5,
        num_res_blocks=1,
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    )
    _, encoder = parts.qwen3_vl(causal=True)
    components = {"processor": parts.qwen3_vl_processor(), "text_encoder": encoder}
    return d.QwenImage21Pipeline(transformer=transformer, scheduler=parts.flow(), vae=vae, **components)


def _joy(name: str, denoiser: str) -> Any:
    transformer = getattr(d, denoiser)(
        in_channels=16, hidden_size=32, num_attention_heads=2, text_dim=32, num_layers=2, rope_dim_list=[4, 6, 6]
    )
    _, encoder = parts.qwen3_vl(causal=True)
    processor = parts.qwen3_vl_processor()
    return getattr(d, name)(
        transformer=transformer,
        scheduler=parts.flow(),
        vae=videos.wan_vae(levels=5, width=2),  # the pipeline resizes its images to about 1024 pixels per side
        text_encoder=encoder,
        tokenizer=processor.tokenizer,
        processor=processor,
    )


def joy_edit() -> Any:
    return _joy("JoyImageEditPipeline", "JoyImageEditTransformer3DModel")


def joy_edit_plus() -> Any:
    return _joy("JoyImageEditPlusPipeline", "JoyImageEditPlusTransformer3DModel")


def dreamlite() -> Any:
    unet = d.DreamLiteUNetModel(
        sample_size=8,
        down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        block_out_channels=(16, 32),
        cross_attention_dim=32,
        attention_head_dim=8,
        layers_per_block=1,
        norm_num_groups=4,
    )
    vae = d.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    _, encoder = parts.qwen3_vl(causal=True)
    processor = parts.qwen3_vl_processor()
    return d.DreamLitePipeline(
        unet=unet,
        vae=vae,
        scheduler=parts.flow(use_dynamic_shifting=True),
        text_encoder=encoder,
        tokenizer=processor.tokenizer,
        processor=processor,
    )
