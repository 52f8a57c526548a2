"""Builders of tiny pipelines of recent denoisers for clips: one function per row of the table."""

from __future__ import annotations

from typing import Any

import diffusers as d
import transformers as tr

from edadm_cli.models.tokenizers import byte_tokenizer, letter_tokenizer
from tests.denoisers import parts, videos

_WAN = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32, "ffn_dim": 32, "num_layers": 2}


def hunyuan_video15() -> Any:
    transformer = d.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=16,
        text_embed_2_dim=32,
        image_embed_dim=12,
        rope_axes_dim=(4, 6, 6),
        target_size=16,
        task_type="t2v",
    )
    vae = d.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    tokenizer, language = parts.qwen_vl()
    _, glyphs = parts.t5()
    return d.HunyuanVideo15Pipeline(
        transformer=transformer,
        vae=vae,
        scheduler=parts.flow(shift=7.0),
        text_encoder=language.model.language_model,
        tokenizer=tokenizer,
        text_encoder_2=glyphs,
        tokenizer_2=tr.ByT5Tokenizer(),
        guider=d.ClassifierFreeGuidance(guidance_scale=6.0),
    )


def framepack() -> Any:
    transformer = d.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=32,
        pooled_projection_dim=16,
        rope_axes_dim=(2, 4, 4),
        has_image_proj=True,
        image_proj_dim=32,
        has_clean_x_embedder=True,
    )
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = tr.SiglipVisionModel(tr.SiglipVisionConfig(**size, image_size=32, patch_size=16))
    processor = tr.SiglipImageProcessor(size={"height": 32, "width": 32})
    (tokenizer, llama), clip = parts.llama(), parts.clip(length=77)
    texts = (tokenizer, llama.model), clip
    images_of = {"image_encoder": vision, "feature_extractor": processor}
    scheduler = parts.flow(shift=7.0)
    return parts.assembled(
        "HunyuanVideoFramepackPipeline",
        transformer,
        *texts,
        vae=videos.hunyuan_vae(),
        scheduler=scheduler,
        **images_of,
    )


def easyanimate() -> Any:
    transformer = d.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=32,
        num_layers=2,
        mmdit_layers=1,
        sample_width=16,
        sample_height=16,
        patch_size=2,
    )
    vae = d.AutoencoderKLMagvit(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )
    text = parts.qwen2_vl()
    return parts.assembled("EasyAnimatePipeline", transformer, text, vae=vae)


def motif() -> Any:
    transformer = d.MotifVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=2,
        patch_size=1,
        text_embed_dim=32,
        rope_axes_dim=(4, 4, 4),
    )
    tokenizer = letter_tokenizer(model_max_length=64)
    config = tr.T5Gemma2TextConfig(vocab_size=len(tokenizer), **parts.SMALL, max_position_embeddings=128)
    config.dropout_rate = 0.0
    encoder = tr.T5Gemma2Encoder(tr.T5Gemma2EncoderConfig(text_config=config))
    components = {"vae": videos.wan_vae(), "scheduler": parts.flow(shift=7.0)}
    components |= {"guider": d.AdaptiveProjectedGuidance(), "feature_extractor": None}
    return parts.assembled("MotifVideoPipeline", transformer, (tokenizer, encoder), **components)


def helios() -> Any:
    transformer = d.HeliosTransformer3DModel(**_WAN, rope_dim=(4, 4, 4))
    text = parts.t5(multilingual=True)
    scheduler = d.HeliosScheduler(stage_range=[0, 1], stages=1, use_dynamic_shifting=True)
    return parts.assembled("HeliosPipeline", transformer, text, vae=videos.wan_vae(), scheduler=scheduler)


def anyflow_far() -> Any:
    transformer = d.AnyFlowFARTransformer3DModel(**_WAN, rope_max_seq_len=32, chunk_partition=(1, 1, 1))
    text, scheduler = parts.t5(multilingual=True), d.FlowMapEulerDiscreteScheduler(shift=5.0)
    return parts.assembled("AnyFlowFARPipeline", transformer, text, vae=videos.wan_vae(), scheduler=scheduler)


def kandinsky6() -> Any:
    transformer = d.Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=16,
        time_dim=16,
        model_dim=32,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        in_audio_dim=4,
        out_audio_dim=4,
        visual_token_type_num_embeddings=2,
    )
    audio_vae = d.MMAudioVAE(
        mel_bins=8,
        latent_channels=4,
        hidden_channels=8,
        channel_multipliers=(1, 2),
        layers_per_block=1,
        sample_rate=64,
        n_fft=16,
        hop_length=4,
    )
    vocoder = d.MMAudioVocoder(
        num_mels=8,
        upsample_initial_channel=8,
        upsample_rates=(2, 2),
        upsample_kernel_sizes=(4, 4),
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1, 3),),
    )
    _, encoder = parts.qwen_vl()
    tokenizer_2, encoder_2 = parts.clip(length=77)
    return d.Kandinsky6TI2VAPipeline(
        transformer=transformer,
        vae=videos.hunyuan_vae(),
        text_encoder=encoder,
        tokenizer=parts.qwen_vl_processor(),
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        scheduler=parts.flow(shift=7.0),
        audio_vae=audio_vae,
        vocoder=vocoder,
    )


def cosmos3() -> Any:
    tokenizer = byte_tokenizer()
    transformer = d.Cosmos3OmniTransformer(
        head_dim=16,
        hidden_size=32,
        intermediate_size=64,
        latent_channel=16,
        latent_patch_size=1,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=1,
        patch_latent_dim=16,
        rope_axes_dim=[2, 3, 3],
        vocab_size=len(tokenizer),
    )
    return d.Cosmos3OmniPipeline(
        transformer=transformer,
        text_tokenizer=tokenizer,
        vae=videos.wan_vae(),
        scheduler=d.UniPCMultistepScheduler(),
        enable_safety_checker=False,
    )


def ltx2() -> Any:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    tokenizer, encoder = parts.gemma3()
    states = encoder.config.text_config
    transformer = d.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=states.hidden_size,
        rope_double_precision=False,
        rope_type="split",
    )
    sides = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": None}
    connectors = LTX2TextConnectors(
        caption_channels=states.hidden_size,
        text_proj_in_factor=states.num_hidden_layers + 1,
        **{f"{stream}_connector_{name}": value for stream in ("video", "audio") for name, value in sides.items()},
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
        rope_type="split",
    )
    vae = d.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    audio_vae = d.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
    )
    vocoder = LTX2Vocoder(
        in_channels=audio_vae.config.output_channels * audio_vae.config.mel_bins,
        hidden_channels=32,
        out_channels=2,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )
    components = {"connectors": connectors, "audio_vae": audio_vae, "vocoder": vocoder}
    return parts.assembled("LTX2Pipeline", transformer, (tokenizer, encoder), vae=vae, **components)
