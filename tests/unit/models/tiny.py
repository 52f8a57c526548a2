"""Small pipelines of the real classes: the shipped architectures with a fraction of their width and depth."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers import FluxPipeline

from edadm_cli.models.architecture import Architecture, load_architecture

_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
_LATENTS = {"block_out_channels": [32, 32], "layers_per_block": 1, "sample_size": 16} | {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
_TRANSFORMER = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3, "sample_size": 8}
_UNET = {"block_out_channels": [32, 64], "layers_per_block": 1, "sample_size": 8}
_CROSS = {
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
_ATTENDED = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}

_CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "ddpm-cifar10": {"unet": {**_UNET, **_ATTENDED}},
    "ldm-bedroom": {"unet": {**_UNET, **_ATTENDED, "attention_head_dim": 16}},
    "ldm-church": {
        "unet": {
            **_UNET,
            "attention_head_dim": 8,
            "down_block_types": ["AttnDownBlock2D", "ResnetDownsampleBlock2D"],
            "up_block_types": ["ResnetUpsampleBlock2D", "AttnUpBlock2D"],
        }
    },
    "ldm-imagenet": {
        "transformer": {
            **_UNET,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "cross_attention_dim": 16,
        }
    },
    "sd15": {"unet": {**_UNET, **_CROSS, "cross_attention_dim": 32}},
    "sd15-inpaint": {"unet": {**_UNET, **_CROSS, "cross_attention_dim": 32}},
    "sd21": {"unet": {**_UNET, **_CROSS, "cross_attention_dim": 32, "attention_head_dim": [2, 4]}},
    "sdxl": {
        "unet": {
            **_UNET,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2],
            "attention_head_dim": [2, 4],
            "cross_attention_dim": 64,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
        }
    },
    "dit-xl-2": {"transformer": _TRANSFORMER},
    "pixart-sigma": {
        "transformer": {**_TRANSFORMER, "sample_size": 32, "cross_attention_dim": 32, "caption_channels": 32},
        # its images have 256 pixels a side at least: reduced by eight, they have 256 tokens instead of 4,096
        "vae": {
            "block_out_channels": [32] * 4,
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
        },
    },
    "sd3.5-medium": {
        "transformer": {
            **_TRANSFORMER,
            "joint_attention_dim": 64,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 64,
            "pos_embed_max_size": 8,
            "dual_attention_layers": [0],
        }
    },
    "flux-schnell": {
        "transformer": {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": [4, 6, 6],
        }
    },
}
_CHANGES["flux-dev"] = _CHANGES["flux-schnell"]
_MEDIUM = _CHANGES["sd3.5-medium"]["transformer"]
_CHANGES["sd3.5-large"] = {"transformer": {k: v for k, v in _MEDIUM.items() if k != "dual_attention_layers"}}

SHRUNK = sorted(_CHANGES)
"""The architectures that `shrunk` knows: those whose family makes an example call."""

FLUX_SAMPLE_SIZE = 16


def shrink_flux(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes Flux generate with 64 tokens; the pipeline uses 4,096 whatever its transformer's size."""
    size = property(lambda pipeline: FLUX_SAMPLE_SIZE, lambda pipeline, value: None)
    monkeypatch.setattr(FluxPipeline, "default_sample_size", size, raising=False)


def shrunk(name: str) -> Architecture:
    """Returns a shipped architecture that is small enough for a test."""
    real = load_architecture(name)
    components = {}
    for component, (cls, config) in real.components.items():
        change: dict[str, Any] = _CHANGES[name].get(component, {})
        if cls.endswith(("AutoencoderKL", "VQModel")):
            change = {**_LATENTS, **({"num_vq_embeddings": 64} if cls.endswith("VQModel") else {}), **change}
        elif "T5Encoder" in cls:
            change = _T5
        elif "CLIPText" in cls:
            change = {**_TEXT, "projection_dim": 32}
        elif cls.endswith("Tokenizer"):
            change = {"model_max_length": min(16, config["model_max_length"])} if "T5" in cls else {}
        components[component] = (cls, {**config, **change})
    if name.startswith("sd3.5"):  # the states of T5 are as wide as both of CLIP's together
        cls, config = components["text_encoder_3"]
        components["text_encoder_3"] = (cls, {**config, "d_model": 64})
    return real.model_copy(update={"components": components})
