"""Builders of other tiny pipelines that make images with a transformer: one function per row of the table."""

from __future__ import annotations

from typing import Any

import diffusers as d
import transformers as tr

from tests.denoisers import parts

_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


def dit() -> Any:
    transformer = d.DiTTransformer2DModel(
        **_HEADS,
        num_layers=2,
        sample_size=8,
        out_channels=8,
        num_embeds_ada_norm=1000,
    )
    return d.DiTPipeline(transformer=transformer, vae=parts.kl(levels=2), scheduler=d.DDIMScheduler())


def pixart() -> Any:
    text = parts.t5()
    transformer = d.PixArtTransformer2DModel(
        **_HEADS,
        num_layers=2,
        sample_size=16,
        cross_attention_dim=32,
        caption_channels=32,
        out_channels=8,
    )
    return parts.assembled(
        "PixArtSigmaPipeline", transformer, text, vae=parts.kl(), scheduler=d.DPMSolverMultistepScheduler()
    )


def sd3() -> Any:
    texts = parts.clip(projection=True), parts.clip(projection=True), parts.t5()
    transformer = d.SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        **_HEADS,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    vae, scheduler = parts.kl(shift_factor=0.1), parts.flow(shift=3.0)
    return parts.assembled("StableDiffusion3Pipeline", transformer, *texts, vae=vae, scheduler=scheduler)


def _qwen_transformer() -> Any:
    return d.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        **_HEADS,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )


def qwen_image() -> Any:
    text, vae = parts.qwen_vl(), parts.qwen_vae()
    return parts.assembled("QwenImagePipeline", _qwen_transformer(), text, vae=vae)


def qwen_image_edit() -> Any:
    text = parts.qwen_vl()
    vae = parts.qwen_vae(levels=5)  # the pipeline resizes its images to 1024 pixels per side
    processor = parts.qwen_vl_processor()
    return parts.assembled("QwenImageEditPipeline", _qwen_transformer(), text, vae=vae, processor=processor)


def z_image() -> Any:
    text = parts.qwen3()
    transformer = d.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    return parts.assembled("ZImagePipeline", transformer, text)


def auraflow() -> Any:
    text = parts.t5(multilingual=True)
    transformer = d.AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pos_embed_max_size=256,
    )
    return parts.assembled("AuraFlowPipeline", transformer, text, vae=parts.kl(), scheduler=parts.flow(shift=1.73))


def sana() -> Any:
    text = parts.gemma()
    transformer = d.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        **_HEADS,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=32,
        sample_size=16,
        patch_size=1,
    )
    vae = d.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock",) * 6,
        decoder_block_types=("ResBlock",) * 6,
        encoder_block_out_channels=(8,) * 6,
        decoder_block_out_channels=(8,) * 6,
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=[1] * 6,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    return parts.assembled("SanaPipeline", transformer, text, vae=vae, scheduler=parts.flow(shift=3.0))


def lumina2() -> Any:
    text = parts.gemma()
    transformer = d.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        ffn_dim_multiplier=None,
        norm_eps=1e-5,
        axes_dim_rope=[4, 2, 2],
        axes_lens=[512, 128, 128],
        cap_feat_dim=32,
    )
    return parts.assembled("Lumina2Pipeline", transformer, text)


def cogview4() -> Any:
    text = parts.glm()
    transformer = d.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        **_HEADS,
        out_channels=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
        sample_size=8,
        rope_axes_dim=(16, 16),
    )
    scheduler = parts.flow(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
    )
    return parts.assembled("CogView4Pipeline", transformer, text, vae=parts.kl(), scheduler=scheduler)


def hunyuan_dit() -> Any:
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    tokenizer = tr.BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=77)
    encoder = tr.BertModel(
        tr.BertConfig(
            vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
        )
    )
    texts = (tokenizer, encoder), parts.t5()
    transformer = d.HunyuanDiT2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        in_channels=4,
        cross_attention_dim=32,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        hidden_size=32,
        activation_fn="gelu-approximate",
        text_len=77,
        text_len_t5=256,
    )
    scheduler = d.DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    return parts.assembled(
        "HunyuanDiTPipeline", transformer, *texts, vae=parts.kl(), scheduler=scheduler, **parts.NO_CHECKER
    )


def hunyuan_image() -> Any:
    texts = parts.qwen_vl(), parts.t5()
    transformer = d.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        **_HEADS,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=(1, 1),
        guidance_embeds=False,
        text_embed_dim=16,
        text_embed_2_dim=32,
        rope_axes_dim=(8, 8),
    )
    vae = d.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=1,
        spatial_compression_ratio=8,
        sample_size=64,
        scaling_factor=0.5,
    )
    guider = {"enabled": False}
    return parts.assembled(
        "HunyuanImagePipeline",
        transformer,
        *texts,
        vae=vae,
        scheduler=parts.flow(shift=7.0),
        guider=d.AdaptiveProjectedMixGuidance(**guider),
        ocr_guider=d.AdaptiveProjectedMixGuidance(**guider),
    )


def hidream_transformer(patch_size: int = 2) -> Any:
    return d.HiDreamImageTransformer2DModel(
        patch_size=patch_size,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[32, 32],
        text_emb_dim=32,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(16, 16),
        llama_layers=[0, 1],
        force_inference_output=True,
    )


def hidream() -> Any:
    two = [parts.clip(projection=True, length=128) for _ in range(2)]
    texts = *two, parts.t5(), parts.llama()
    vae, scheduler = parts.kl(shift_factor=0.1), parts.flow(shift=3.0)
    transformer = hidream_transformer(patch_size=8)  # its pipeline brings every size to 128x128 latents
    return parts.assembled("HiDreamImagePipeline", transformer, *texts, vae=vae, scheduler=scheduler)


def krea2() -> Any:
    text = parts.qwen3_vl()
    transformer = d.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        **_HEADS,
        num_key_value_heads=1,
        intermediate_size=64,
        timestep_embed_dim=32,
        text_hidden_dim=32,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=64,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    scheduler = parts.flow(use_dynamic_shifting=True)
    return parts.assembled(
        "Krea2Pipeline",
        transformer,
        text,
        vae=parts.qwen_vae(),
        scheduler=scheduler,
        text_encoder_select_layers=(1, 2),
    )


def prx() -> Any:
    text = parts.gemma()
    transformer = d.PRXTransformer2DModel(
        in_channels=4,
        patch_size=2,
        context_in_dim=32,
        hidden_size=32,
        mlp_ratio=2.0,
        num_heads=2,
        depth=2,
        axes_dim=[8, 8],
    )
    return parts.assembled("PRXPipeline", transformer, text, vae=parts.kl(shift_factor=0.0), default_sample_size=64)


def ovis() -> Any:
    text = parts.qwen3()
    transformer = d.OvisImageTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=2,
        **_HEADS,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    scheduler = parts.flow(use_dynamic_shifting=True)
    return parts.assembled("OvisImagePipeline", transformer, text, scheduler=scheduler)
