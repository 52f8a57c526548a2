"""Builders of tiny pipelines of less common denoisers, for images and clips: one function per row of the table."""

from __future__ import annotations

from typing import Any

import diffusers as d
import torch

from edadm_cli.models.random_models import initialize
from edadm_cli.models.tokenizers import letter_tokenizer
from tests.denoisers import flux, parts, unets, videos

_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


def cogview3() -> Any:
    transformer = d.CogView3PlusTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        **_HEADS,
        text_embed_dim=32,
        time_embed_dim=16,
        condition_dim=4,
        pos_embed_max_size=16,
        sample_size=8,
    )
    scheduler = d.CogVideoXDDIMScheduler()
    return parts.assembled("CogView3PlusPipeline", transformer, parts.t5(), scheduler=scheduler, vae=parts.kl())


def latte() -> Any:
    transformer = d.LatteTransformer3DModel(
        **_HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=32,
        video_length=2,
    )
    return parts.assembled("LattePipeline", transformer, parts.t5(), scheduler=parts.ddim(), vae=parts.kl())


def lumina() -> Any:
    transformer = d.LuminaNextDiT2DModel(
        sample_size=8,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=32,
    )
    torch.nn.init.zeros_(transformer.pad_token)  # diffusers leaves it as the memory was
    return parts.assembled("LuminaPipeline", transformer, parts.gemma())


def mochi() -> Any:
    transformer = d.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    vae = d.AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )
    return parts.assembled("MochiPipeline", transformer, parts.t5(), vae=vae)


def allegro() -> Any:
    transformer = d.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=2,
        cross_attention_dim=48,
        sample_height=8,
        sample_width=8,
        sample_frames=8,
        caption_channels=32,
    )
    vae = d.AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        sample_size=128,
    )
    return parts.assembled(
        "AllegroPipeline", transformer, parts.t5(), vae=vae, scheduler=d.EulerAncestralDiscreteScheduler()
    )


def sana_video() -> Any:
    transformer = d.SanaVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=32,
        sample_size=8,
    )
    return parts.assembled("SanaVideoPipeline", transformer, parts.gemma(), vae=videos.wan_vae())


_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def skyreels() -> Any:
    transformer = d.SkyReelsV2Transformer3DModel(**_WAN)
    text = parts.t5(multilingual=True)
    scheduler = d.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)
    return parts.assembled("SkyReelsV2Pipeline", transformer, text, vae=videos.wan_vae(), scheduler=scheduler)


def wan_vace() -> Any:
    transformer = d.WanVACETransformer3DModel(**_WAN, vace_layers=[0], vace_in_channels=96)
    text = parts.t5(multilingual=True)
    return parts.assembled("WanVACEPipeline", transformer, text, vae=videos.wan_vae())


def anyflow() -> Any:
    transformer = d.AnyFlowTransformer3DModel(**_WAN)
    text, scheduler = parts.t5(multilingual=True), d.FlowMapEulerDiscreteScheduler()
    return parts.assembled("AnyFlowPipeline", transformer, text, vae=videos.wan_vae(), scheduler=scheduler)


def chronoedit() -> Any:
    transformer = d.ChronoEditTransformer3DModel(**_WAN, in_channels=36, image_dim=32, added_kv_proj_dim=24)
    text, images_of = parts.t5(multilingual=True), {"image_processor": parts.image_processor()}
    vision = parts.vision().vision_model
    return parts.assembled(
        "ChronoEditPipeline", transformer, text, vae=videos.wan_vae(), image_encoder=vision, **images_of
    )


def kandinsky3() -> Any:
    unet = d.Kandinsky3UNet(
        time_embedding_dim=16,
        groups=2,
        attention_head_dim=8,
        block_out_channels=(32, 64),
        cross_attention_dim=16,
        encoder_hid_dim=32,
    )
    tokenizer, encoder = parts.t5(length=128)
    return d.Kandinsky3Pipeline(
        tokenizer=tokenizer, text_encoder=encoder, unet=unet, scheduler=d.DDPMScheduler(), movq=unets.movq()
    )


def kandinsky5() -> Any:
    transformer = d.Kandinsky5Transformer3DModel(
        in_text_dim=16,
        in_text_dim2=16,
        time_dim=16,
        model_dim=32,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
    )
    _, encoder = parts.qwen_vl()
    tokenizer_2, encoder_2 = parts.clip(length=77)
    return d.Kandinsky5T2VPipeline(
        transformer=transformer,
        vae=videos.hunyuan_vae(),
        text_encoder=encoder,
        tokenizer=parts.qwen_vl_processor(),
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        scheduler=parts.flow(shift=7.0),
    )


def bria() -> Any:
    transformer = d.BriaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        **_HEADS,
        joint_attention_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    return parts.assembled("BriaPipeline", transformer, parts.t5())


def longcat() -> Any:
    transformer = d.LongCatImageTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        **_HEADS,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=[4, 4, 8],
    )
    vae, processor = parts.kl(16, shift_factor=0.1), parts.qwen_vl_processor()
    processor.chat_template = processor.tokenizer.chat_template
    return parts.assembled("LongCatImagePipeline", transformer, parts.qwen_vl(), text_processor=processor, vae=vae)


def i2vgen() -> Any:
    unet = d.I2VGenXLUNet(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=32,
        num_attention_heads=2,
    )
    tokenizer, encoder = parts.clip(width=32)
    return d.I2VGenXLPipeline(
        vae=parts.kl(levels=2),
        text_encoder=encoder,
        tokenizer=tokenizer,
        image_encoder=parts.vision(32),
        feature_extractor=parts.image_processor(),
        unet=unet,
        scheduler=parts.ddim(),
    )


def ernie() -> Any:
    transformer = d.ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=64,
        in_channels=16,
        out_channels=16,
        text_in_dim=32,
        rope_axes_dim=(4, 4, 8),
    )
    initialize(transformer, 0)  # diffusers sets its last layer to zero
    return parts.assembled("ErnieImagePipeline", transformer, parts.qwen3(), vae=flux.flux2_vae())


def omnigen() -> Any:
    tokenizer = letter_tokenizer(model_max_length=64)
    transformer = d.OmniGenTransformer2DModel(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=32,
        num_layers=2,
        pad_token_id=0,
        vocab_size=1000,
        max_position_embeddings=1000,
        original_max_position_embeddings=1000,
        pos_embed_max_size=16,
        time_step_dim=4,
        rope_scaling={"long_factor": [1.0] * 4, "short_factor": [1.0] * 4, "type": "su"},
    )
    return d.OmniGenPipeline(transformer=transformer, scheduler=parts.flow(), vae=parts.kl(), tokenizer=tokenizer)


def ideogram4() -> Any:
    def transformer() -> Any:
        return d.Ideogram4Transformer2DModel(
            in_channels=16,
            num_layers=2,
            **_HEADS,
            intermediate_size=64,
            adaln_dim=16,
            llm_features_dim=13 * 32,  # the states of 13 layers of the text encoder
            mrope_section=(4, 2, 2),
        )

    text, vae = parts.qwen3_vl(layers=36), flux.flux2_vae()
    return parts.assembled("Ideogram4Pipeline", transformer(), text, vae=vae, unconditional_transformer=transformer())
