"""Builders of denoisers of each family with a few thousand random weights, plain or quantized, for tests of engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from edadm_cli.calibrate.nearest import quantize_to_nearest
from edadm_cli.config import BitWidth
from edadm_cli.models.example_calls import example_call
from edadm_cli.models.random_models import initialize
from edadm_cli.recipe import AttentionRecipe, RangeRecipe, Recipe

Call = tuple[tuple[Any, ...], dict[str, Any]]
RECIPE = Recipe(name="test", ranges=RangeRecipe(weight="minmax", activation="minmax"))
# Products of attention and the inputs of the first and last layers are quantized too.
EVERYWHERE = RECIPE.model_copy(
    update={"attention": AttentionRecipe(quantize=True), "sample_float_input": False, "output_float_input": False}
)


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}


def _unet(**fields: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    small = {"sample_size": 8, "block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
    attention = {"cross_attention_dim": 16, "attention_head_dim": 2}
    down, up = ("CrossAttnDownBlock2D",), ("CrossAttnUpBlock2D",)
    blocks = {"down_block_types": down, "mid_block_type": None, "up_block_types": up}
    return UNet2DConditionModel(**{**small, **attention, **blocks, **fields})


def _dit(**fields: Any) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    small = {"sample_size": 4, "num_layers": 1, "out_channels": 8, "norm_num_groups": 4}
    return DiTTransformer2DModel(**{**_HEADS, **small, **fields})


def _pixart(**fields: Any) -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    small = {"sample_size": 4, "num_layers": 1, "norm_num_groups": 4, "use_additional_conditions": False}
    text = {"cross_attention_dim": 16, "caption_channels": 12}
    return PixArtTransformer2DModel(**{**_HEADS, **small, **text, **fields})


def _sd3(**fields: Any) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    small = {"sample_size": 8, "num_layers": 1, "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 8}
    text = {"joint_attention_dim": 24, "caption_projection_dim": 16, "pooled_projection_dim": 16}
    kind = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}
    return SD3Transformer2DModel(**{**_HEADS, **small, **text, **kind, **fields})


def _flux(**fields: Any) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    small = {"num_layers": 1, "num_single_layers": 1, "in_channels": 16, "axes_dims_rope": (4, 6, 6)}
    text = {"joint_attention_dim": 24, "pooled_projection_dim": 16}
    heads = {"num_attention_heads": 2, "attention_head_dim": 16}
    return FluxTransformer2DModel(**{**heads, **small, **text, **fields})


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "unet": _unet,
    "dit": _dit,
    "pixart": _pixart,
    "sd3": _sd3,
    "flux": _flux,
}


def tiny_denoiser(family: str, rows: int = 2, size: int = 8, **fields: Any) -> tuple[nn.Module, Call]:
    """Returns a full-precision denoiser in eval mode, and a call of it; `fields` change its configuration."""
    denoiser = FAMILIES[family](**fields).eval().requires_grad_(False)
    initialize(denoiser, 0)
    return denoiser, example_call(denoiser, batch_size=rows, size=(size, size))


def quantized_denoiser(family: str, bits: str = "w8a8", rows: int = 2, **fields: Any) -> tuple[nn.Module, Call]:
    """Returns a denoiser that is quantized to nearest, and the call that its ranges are from."""
    denoiser, call = tiny_denoiser(family, rows, **fields)
    with torch.no_grad():
        quantize_to_nearest(denoiser, RECIPE, BitWidth.parse(bits), [call])
    return denoiser, call
