"""Denoisers of each family with a few thousand random weights, and quantized ones, for tests of engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from edadm_cli.calibrate.nearest import quantize_to_nearest
from edadm_cli.config import BitWidth
from edadm_cli.models.example_calls import example_call
from edadm_cli.models.random_models import initialize
from edadm_cli.recipe import RangeRecipe, Recipe

Call = tuple[tuple[Any, ...], dict[str, Any]]
RECIPE = Recipe(name="test", ranges=RangeRecipe(weight="minmax", activation="minmax"))


def _unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
    )


def _dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        sample_size=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, out_channels=8, norm_num_groups=4
    )


def _pixart() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        sample_size=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        cross_attention_dim=16,
        caption_channels=12,
        norm_num_groups=4,
        use_additional_conditions=False,
    )


def _sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        in_channels=4,
        out_channels=4,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
        pos_embed_max_size=8,
    )


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    )


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "unet": _unet,
    "dit": _dit,
    "pixart": _pixart,
    "sd3": _sd3,
    "flux": _flux,
}


def tiny_denoiser(family: str, rows: int = 2, size: int = 8) -> tuple[nn.Module, Call]:
    """A full-precision denoiser in eval mode, and a call of it."""
    denoiser = FAMILIES[family]().eval().requires_grad_(False)
    initialize(denoiser, 0)
    return denoiser, example_call(denoiser, batch_size=rows, size=(size, size))


def quantized_denoiser(family: str, bits: str = "w8a8", rows: int = 2) -> tuple[nn.Module, Call]:
    """A denoiser quantized to nearest, and the call that gave its ranges."""
    denoiser, call = tiny_denoiser(family, rows)
    with torch.no_grad():
        quantize_to_nearest(denoiser, RECIPE, BitWidth.parse(bits), [call])
    return denoiser, call
