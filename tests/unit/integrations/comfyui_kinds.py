"""Small denoisers of the kinds that ComfyUI knows, quantized to nearest at eight bits."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import (
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from diffusers.loaders import single_file_utils
from torch import Tensor, nn

from edadm_cli.quant.layers import quantized_layer
from edadm_cli.quant.network import set_module
from edadm_cli.quant.plan import LayerPlan
from edadm_cli.quant.split_layer import SplitLayer

FLUX = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
KINDS: dict[str, Any] = {
    "flux": lambda: FluxTransformer2DModel(
        **FLUX, in_channels=8, joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    ),
    "sd3": lambda: SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=8, dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ),
    "unet": lambda: UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, attention_head_dim=2,
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    "qwen": lambda: QwenImageTransformer2DModel(
        in_channels=8, out_channels=2, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    ),
    "z_image": lambda: ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[64, 64, 64],
    ),
}  # fmt: skip


def narrow_flux_conversion() -> Any:
    """The conversion that diffusers has for FLUX knows one width of the network only: here it gets the test's."""
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert source.count("inner_dim = 3072") == 1
    scope = vars(single_file_utils).copy()
    exec(source.replace("inner_dim = 3072", "inner_dim = 32"), scope)
    return scope["convert_flux_transformer_checkpoint_to_diffusers"]


def quantize_all(denoiser: nn.Module) -> dict[str, Tensor]:
    """Quantizes every layer to nearest at eight bits, in place; returns the dequantized weights by name."""
    weights = {}
    for name, layer in list(denoiser.named_modules()):
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        rows = layer.weight.detach().flatten(1)
        scale = rows.abs().amax(1).clamp_min(1e-6) / 127
        codes = (rows / scale[:, None]).round().reshape(layer.weight.shape).to(torch.int8)
        quantized = quantized_layer(layer, LayerPlan(weight_bits=8))
        assert not isinstance(quantized, SplitLayer)
        quantized.set_parameters(codes, scale)
        set_module(denoiser, name, quantized)
        weights[f"{name}.weight"] = (codes.flatten(1) * scale[:, None]).reshape(layer.weight.shape)
    return weights
