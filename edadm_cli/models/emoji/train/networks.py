"""Builds the untrained networks of the emoji models and their schedulers."""

from __future__ import annotations

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import nn
from transformers import CLIPTextConfig

from edadm_cli.models.emoji.captions import MAX_TOKENS
from edadm_cli.models.emoji.encoder import EMBEDDING
from edadm_cli.models.emoji.train.tokenizer import VOCABULARY

TEXT_WIDTH = 192
LATENT_SIZE = 16


def text_config(small: bool) -> CLIPTextConfig:
    """Returns the configuration of the text encoder that both pipelines share."""
    return CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=2 if small else 3,
        num_attention_heads=6,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=EMBEDDING,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=VOCABULARY - 1,
    )


def build_autoencoder(small: bool) -> AutoencoderKL:
    """Builds the autoencoder, which encodes 3x64x64 pixels as 4x16x16 latents."""
    return AutoencoderKL(
        sample_size=64,
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(16, 16, 16) if small else (32, 64, 96),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )


def build_unet(small: bool) -> UNet2DConditionModel:
    """Builds the denoiser of `emoji-sd`, which has Stable Diffusion's blocks on three resolutions."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 32, 64) if small else (96, 128, 144),
        layers_per_block=1 if small else 2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # the number of heads, as in Stable Diffusion 1.x
        norm_num_groups=16,
    )


def build_transformer(small: bool) -> SD3Transformer2DModel:
    """Builds the denoiser of `emoji-dit`, a Stable Diffusion 3 transformer with one token per position of 16x16."""
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2 if small else 1,
        in_channels=4,
        out_channels=4,
        num_layers=2 if small else 7,
        attention_head_dim=48,
        num_attention_heads=4,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=192,
        pooled_projection_dim=2 * EMBEDDING,
        pos_embed_max_size=LATENT_SIZE,
        qk_norm="rms_norm",
    )
    _start_as_identity(transformer)
    return transformer


def _start_as_identity(transformer: SD3Transformer2DModel) -> None:
    """Sets the modulations and the last layer to zero, as adaLN-Zero does (arXiv 2212.09748, section 3.2)."""
    for name, module in transformer.named_modules():
        if name == "proj_out" or (name.endswith(".linear") and "norm" in name):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def build_pixel_unet(small: bool) -> UNet2DModel:
    """Builds the denoiser of `ddpm-emoji`, which has the architecture and size of DDPM's CIFAR-10 denoiser.

    It has no dropout: the training sees each picture some dozen times, so that it cannot overfit.
    """
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 32, 32, 32) if small else (128, 256, 256, 256),
        layers_per_block=1 if small else 2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        norm_eps=1e-6,
        flip_sin_to_cos=False,
        freq_shift=1,
        downsample_padding=0,
    )


def noise_scheduler() -> EulerDiscreteScheduler:
    """Returns the scheduler of `emoji-sd`: Stable Diffusion 1.5's noise and timesteps, sampled by Euler steps.

    The training reads its `alphas_cumprod` alone, and mixes latents and noise itself: `add_noise` of an Euler scheduler
    does not scale the latents down.
    """
    return EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
        prediction_type="epsilon",
    )


def flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Returns the scheduler of `emoji-dit`, which takes Euler steps along straight paths from noise to latents."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)


def pixel_scheduler() -> DDIMScheduler:
    """Returns the scheduler of `ddpm-emoji`: DDPM's noise, sampled by DDIM without clipping, as on CIFAR-10.

    References:
        DDPM, arXiv 2006.11239, section 4 (the betas); DDIM, arXiv 2010.02502, equation 12.
    """
    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False
    )
