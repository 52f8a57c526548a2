"""What tiny pipelines are put together from: tokenizers, text encoders, autoencoders, schedulers."""

from __future__ import annotations

from typing import Any

import diffusers as d
import transformers as tr

from edadm_cli.models.tokenizers import VISION_TOKENS, byte_tokenizer, letter_tokenizer

Pair = tuple[Any, Any]
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789<>/()&;'\""
NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
SCALING_FACTOR = 0.18215  # of the autoencoder of Stable Diffusion
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


def clip(*, projection: bool = False, width: int = 16, length: int = 8) -> Pair:
    """A CLIP tokenizer of single letters, and a text encoder."""
    tokens = [*_LETTERS, *(c + "</w>" for c in _LETTERS), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = tr.CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=length)
    config = tr.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, (tr.CLIPTextModelWithProjection if projection else tr.CLIPTextModel)(config)


def t5(*, multilingual: bool = False, length: int = 16) -> Pair:
    """A T5 tokenizer of single letters, and an encoder with 32 channels."""
    tokenizer = letter_tokenizer(model_max_length=length)
    config, model = (tr.UMT5Config, tr.UMT5EncoderModel) if multilingual else (tr.T5Config, tr.T5EncoderModel)
    size = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return tokenizer, model(config(vocab_size=len(tokenizer), **size))


def gemma() -> Pair:
    """A Gemma 2 with 32 channels."""
    tokenizer = letter_tokenizer(model_max_length=16)
    tokenizer.padding_side = "right"
    return tokenizer, tr.Gemma2Model(tr.Gemma2Config(vocab_size=len(tokenizer), **SMALL))


def glm() -> Pair:
    """A GLM with 32 channels."""
    tokenizer = letter_tokenizer(model_max_length=16)
    return tokenizer, tr.GlmModel(tr.GlmConfig(vocab_size=len(tokenizer), pad_token_id=0, **SMALL))


def qwen3(*, layers: int = 2, causal: bool = False) -> Pair:
    """A Qwen 3 with 32 channels."""
    tokenizer = byte_tokenizer()
    config = tr.Qwen3Config(
        vocab_size=len(tokenizer), max_position_embeddings=4096, **(SMALL | {"num_hidden_layers": layers})
    )
    return tokenizer, (tr.Qwen3ForCausalLM if causal else tr.Qwen3Model)(config)


def qwen_vl() -> Pair:
    """A Qwen 2.5 VL with 16 channels."""
    tokenizer = byte_tokenizer()
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 2, "vocab_size": len(tokenizer), "rope_scaling": rope, "rope_theta": 1e6}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    start, end, image, video = tokenizer.convert_tokens_to_ids([*VISION_TOKENS])
    ids = {"vision_start_token_id": start, "vision_end_token_id": end, "image_token_id": image}
    config = tr.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, hidden_size=16, vocab_size=len(tokenizer), video_token_id=video, **ids
    )
    return tokenizer, tr.Qwen2_5_VLForConditionalGeneration(config)


def qwen_vae(levels: int = 2) -> Any:
    """The autoencoder of Qwen-Image, with 4 latent channels; it halves `levels` times."""
    return d.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 4] if levels == 2 else [1] * (levels + 1),
        num_res_blocks=1,
        temperal_downsample=[False] * (levels - 1) + [True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def qwen_vl_processor() -> Any:
    """What prepares prompts and images for `qwen_vl`; the images have at most four patches."""
    images = tr.Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=56 * 56)
    return tr.Qwen2VLProcessor(
        image_processor=images, tokenizer=byte_tokenizer(), video_processor=tr.Qwen2VLVideoProcessor()
    )


def qwen3_vl(*, layers: int = 2, causal: bool = False) -> Pair:
    """A Qwen 3 VL with 32 channels."""
    tokenizer = byte_tokenizer()
    rope = {"mrope_section": [2, 3, 3], "rope_type": "default", "mrope_interleaved": True, "rope_theta": 1e6}
    text = {**SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 4096, "rope_parameters": rope}
    text["num_hidden_layers"] = layers
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"deepstack_visual_indexes": [0], "patch_size": 16, "num_position_embeddings": 64}
    start, end, image, video = tokenizer.convert_tokens_to_ids([*VISION_TOKENS])
    ids = {"vision_start_token_id": start, "vision_end_token_id": end, "image_token_id": image}
    config = tr.Qwen3VLConfig(text_config=text, vision_config=vision, video_token_id=video, **ids)
    return tokenizer, (tr.Qwen3VLForConditionalGeneration if causal else tr.Qwen3VLModel)(config)


def qwen3_vl_processor() -> Any:
    """What prepares prompts and images for `qwen3_vl`; the images have at most four patches."""
    tokenizer = byte_tokenizer()
    images = tr.Qwen2VLImageProcessor(patch_size=16, min_pixels=32 * 32, max_pixels=64 * 64)
    return tr.Qwen3VLProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=tr.Qwen3VLVideoProcessor(patch_size=16),
        chat_template=tokenizer.chat_template,
    )


def qwen2_vl() -> Pair:
    """A Qwen 2 VL with 32 channels."""
    tokenizer = byte_tokenizer()
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    text["rope_parameters"] = {"mrope_section": [2, 3, 3], "rope_type": "default", "rope_theta": 1e6}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2}
    return tokenizer, tr.Qwen2VLForConditionalGeneration(tr.Qwen2VLConfig(text_config=text, vision_config=vision))


def gemma3() -> Pair:
    """A Gemma 3 with 32 channels and a vision tower."""
    tokenizer = letter_tokenizer(model_max_length=16)
    text = {**SMALL, "vocab_size": len(tokenizer) + 1}
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tr.Gemma3Config(
        text_config=text,
        vision_config={**size, "image_size": 32, "patch_size": 16},
        image_token_index=len(tokenizer),
        mm_tokens_per_image=4,
    )
    return tokenizer, tr.Gemma3ForConditionalGeneration(config)


def llama() -> Pair:
    """A Llama with 32 channels and a head."""
    tokenizer = letter_tokenizer(model_max_length=16)
    return tokenizer, tr.LlamaForCausalLM(tr.LlamaConfig(vocab_size=len(tokenizer), **SMALL))


def vision(width: int = 32, size: int = 32) -> Any:
    """A CLIP image encoder with a projection to `width` channels."""
    config = tr.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=size,
        patch_size=16,
        projection_dim=width,
    )
    return tr.CLIPVisionModelWithProjection(config)


def image_processor(size: int = 32) -> Any:
    """The preprocessing of `vision`."""
    return tr.CLIPImageProcessor(crop_size={"height": size, "width": size}, size={"shortest_edge": size})


def kl(channels: int = 4, *, levels: int = 4, **fields: Any) -> Any:
    """An autoencoder that halves `levels - 1` times."""
    return d.AutoencoderKL(
        block_out_channels=(8,) * levels,
        latent_channels=channels,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        **{"sample_size": 64, "scaling_factor": 0.5, **fields},
    )


def small_kl(**fields: Any) -> Any:
    """An autoencoder of one step, for images of 16 pixels per side, with the scale of Stable Diffusion."""
    return kl(levels=2, **{"sample_size": 16, "scaling_factor": SCALING_FACTOR, **fields})


def flow(**fields: Any) -> Any:
    """Flow matching."""
    return d.FlowMatchEulerDiscreteScheduler(**fields)


def ddim(**fields: Any) -> Any:
    """The DDIM of Stable Diffusion."""
    return d.DDIMScheduler(
        **{
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            **fields,
        }
    )


def unet(**fields: Any) -> Any:
    """A UNet of Stable Diffusion, with 16 and 32 channels."""
    return d.UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            **fields,
        }
    )


def xl_unet(**fields: Any) -> Any:
    """A UNet of SDXL for two text encoders with 16 channels each."""
    return unet(
        **{
            "cross_attention_dim": 32,
            "attention_head_dim": (2, 4),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 16,
            "use_linear_projection": True,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            **fields,
        }
    )


def pixel_unet(**fields: Any) -> Any:
    """A UNet in pixel space, with 16 and 32 channels."""
    return d.UNet2DModel(
        **{
            "sample_size": 16,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "attention_head_dim": 8,
            "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            **fields,
        }
    )


def assembled(name: str, denoiser: Any, *texts: Pair, **components: Any) -> Any:
    """Returns a pipeline of a denoiser and its text encoders.

    Args:
        name: Class of the pipeline.
        denoiser: Its `unet` or `transformer`.
        texts: A tokenizer and a text encoder each, in the order of the pipeline's components.
        components: The other components. The default scheduler is flow matching, the default autoencoder that of `kl`.
    """
    for number, (tokenizer, encoder) in enumerate(texts):
        end = f"_{number + 1}" if number else ""
        components |= {f"tokenizer{end}": tokenizer, f"text_encoder{end}": encoder}
    components |= {"unet" if type(denoiser).__name__.startswith("UNet") else "transformer": denoiser}
    components.setdefault("scheduler", flow())
    if "vae" not in components:
        components["vae"] = kl(shift_factor=0.1)
    return getattr(d, name)(**components)
