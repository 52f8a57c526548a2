"""`config.yaml` files that are shipped with CompVis checkpoints: the three known models, and tiny ones."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

_VQ = {
    "target": "ldm.models.autoencoder.VQModelInterface",
    "params": {
        "embed_dim": 3,
        "n_embed": 8192,
        "ddconfig": {
            "double_z": False,
            "z_channels": 3,
            "resolution": 256,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 128,
            "ch_mult": [1, 2, 4],
            "num_res_blocks": 2,
            "attn_resolutions": [],
            "dropout": 0.0,
        },
        "lossconfig": {"target": "torch.nn.Identity"},
    },
}
_KL = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {
        "embed_dim": 4,
        "monitor": "val/rec_loss",
        "ddconfig": {
            "double_z": True,
            "z_channels": 4,
            "resolution": 256,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 128,
            "ch_mult": [1, 2, 4, 4],
            "num_res_blocks": 2,
            "attn_resolutions": [],
            "dropout": 0.0,
        },
    },
}
_UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
_VQ_MODEL = {"linear_start": 0.0015, "linear_end": 0.0195, "timesteps": 1000, "image_size": 64, "channels": 3}
_VQ_UNET = {
    "image_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "attention_resolutions": [8, 4, 2],
    "num_res_blocks": 2,
}
_LABELS = {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": {"n_classes": 1001, "embed_dim": 512}}

REAL: dict[str, dict[str, Any]] = {
    "ldm-bedroom": {
        **_VQ_MODEL,
        "unet_config": {
            "target": _UNET,
            "params": {
                **_VQ_UNET,
                "model_channels": 224,
                "channel_mult": [1, 2, 3, 4],
                "num_head_channels": 32,
            },
        },
        "first_stage_config": _VQ,
        "cond_stage_config": "__is_unconditional__",
    },
    "ldm-church": {
        "linear_start": 0.0015,
        "linear_end": 0.0155,
        "timesteps": 1000,
        "loss_type": "l1",
        "image_size": 32,
        "channels": 4,
        "scale_by_std": True,
        "unet_config": {
            "target": _UNET,
            "params": {
                "image_size": 32,
                "in_channels": 4,
                "out_channels": 4,
                "model_channels": 192,
                "attention_resolutions": [1, 2, 4, 8],
                "num_res_blocks": 2,
                "channel_mult": [1, 2, 2, 4, 4],
                "num_heads": 8,
                "use_scale_shift_norm": True,
                "resblock_updown": True,
            },
        },
        "first_stage_config": _KL,
        "cond_stage_config": "__is_unconditional__",
    },
    "ldm-imagenet": {
        **_VQ_MODEL,
        "cond_stage_key": "class_label",
        "conditioning_key": "crossattn",
        "use_ema": False,
        "unet_config": {
            "target": _UNET,
            "params": {
                **_VQ_UNET,
                "model_channels": 192,
                "channel_mult": [1, 2, 3, 5],
                "num_heads": 1,
                "use_spatial_transformer": True,
                "transformer_depth": 1,
                "context_dim": 512,
            },
        },
        "first_stage_config": _VQ,
        "cond_stage_config": _LABELS,
    },
}


def real(name: str) -> dict[str, Any]:
    """Returns the content of a known model's configuration."""
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": deepcopy(REAL[name])}}


def tiny(name: str) -> dict[str, Any]:
    """Returns the configuration of a small model of the same kind: two levels, 8 x 8 latents, 32 and 64 channels."""
    config = real(name)
    params = config["model"]["params"]
    unet, stage = params["unet_config"]["params"], params["first_stage_config"]["params"]
    params["image_size"] = 8
    unet.update(image_size=8, model_channels=32, channel_mult=[1, 2], num_res_blocks=1, attention_resolutions=[2])
    if "num_head_channels" in unet:
        unet["num_head_channels"] = 16
    if unet.get("num_heads") == 8:
        unet.update(num_heads=4, attention_resolutions=[1], channel_mult=[1, 2, 2])
    if "context_dim" in unet:
        unet["context_dim"] = 16
        params["cond_stage_config"]["params"]["embed_dim"] = 16
    stage["ddconfig"].update(resolution=16, ch=32, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[8])
    if "n_embed" in stage:
        stage["n_embed"] = 32
    return config
