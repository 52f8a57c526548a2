"""Builders of tiny pipelines that make clips: one function per row of the table."""

from __future__ import annotations

from typing import Any

import diffusers as d

from tests.denoisers import parts

_HEADS = {"num_attention_heads": 4, "attention_head_dim": 8}
_EIGHT = (8, 8, 8, 8)


def wan_vae(levels: int = 3, width: int = 4) -> Any:
    """The autoencoder of Wan 2.1; it halves the sides of a picture `levels` times."""
    times = [False] * (levels - 2) + [True, True]
    return d.AutoencoderKLWan(
        base_dim=width,
        z_dim=16,
        dim_mult=[1] * (levels + 1),
        num_res_blocks=1,
        temperal_downsample=times,
        scale_factor_spatial=2**levels,
    )


def _wan_transformer() -> Any:
    return d.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


def _wan(num_transformers: int, **components: Any) -> Any:
    text, vae = parts.t5(multilingual=True), wan_vae()
    first, *others = (_wan_transformer() for _ in range(num_transformers))
    components |= {f"transformer_{number}": other for number, other in enumerate(others, start=2)}
    return parts.assembled("WanPipeline", first, text, vae=vae, scheduler=parts.flow(shift=7.0), **components)


def wan() -> Any:
    return _wan(1)


def wan22() -> Any:
    return _wan(2, boundary_ratio=0.875)


def cogvideox(text_tokens: int = 16) -> Any:
    text = parts.t5()
    transformer = d.CogVideoXTransformer3DModel(
        **_HEADS,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=2,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=text_tokens,
    )
    vae = d.AutoencoderKLCogVideoX(
        in_channels=3,
        out_channels=3,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=_EIGHT,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    scheduler = d.CogVideoXDDIMScheduler()
    return parts.assembled("CogVideoXPipeline", transformer, text, vae=vae, scheduler=scheduler)


def ltx() -> Any:
    text = parts.t5()
    transformer = d.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        **_HEADS,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    )
    vae = d.AutoencoderKLLTXVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=_EIGHT,
        decoder_block_out_channels=_EIGHT,
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False),
        upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return parts.assembled("LTXPipeline", transformer, text, vae=vae)


def stable_video() -> Any:
    unet = d.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=32,
        num_attention_heads=8,
        projection_class_embeddings_input_dim=96,
        addition_time_embed_dim=32,
    )
    vae = d.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        latent_channels=4,
        layers_per_block=1,
        sample_size=16,
    )
    return d.StableVideoDiffusionPipeline(
        vae=vae,
        image_encoder=parts.vision(32, size=224),
        unet=unet,
        scheduler=d.EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            timestep_type="continuous",
            prediction_type="v_prediction",
            use_karras_sigmas=True,
        ),
        feature_extractor=parts.image_processor(224),
    )


def animatediff() -> Any:
    tokenizer, encoder = parts.clip()
    adapter = d.MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=4
    )
    return d.AnimateDiffPipeline(
        vae=parts.kl(levels=2),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=d.UNetMotionModel.from_unet2d(parts.unet(), adapter),
        motion_adapter=adapter,
        scheduler=parts.ddim(beta_schedule="linear"),
    )


def text_to_video() -> Any:
    text = parts.clip(width=32)
    unet = d.UNet3DConditionModel(
        block_out_channels=(8, 8),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=2,
    )
    return parts.assembled("TextToVideoSDPipeline", unet, text, vae=parts.kl(levels=2), scheduler=parts.ddim())


def hunyuan_vae() -> Any:
    """The autoencoder of HunyuanVideo, with 4 latent channels."""
    return d.AutoencoderKLHunyuanVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=_EIGHT,
        layers_per_block=1,
        act_fn="silu",
        norm_num_groups=4,
        scaling_factor=0.476986,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
        mid_block_add_attention=True,
    )


def hunyuan_video() -> Any:
    llama, clip = parts.llama(), parts.clip(length=77)
    transformer = d.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=32,
        pooled_projection_dim=16,
        rope_axes_dim=(2, 4, 4),
    )
    texts = (llama[0], llama[1].model), clip
    return parts.assembled(
        "HunyuanVideoPipeline", transformer, *texts, vae=hunyuan_vae(), scheduler=parts.flow(shift=7.0)
    )
