"""The `config.yaml` of a CompVis latent-diffusion checkpoint, read as data: nothing in it is instantiated by name.

References:
    Latent Diffusion, arXiv 2112.10752, and the configurations of its repository.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from edadm_cli.errors import InputError
from edadm_cli.models.architecture import Architecture, load_architecture

CONFIG_NAME = "config.yaml"
NUM_LABELS = 1001  # classes of ImageNet and "no class"
_LARGEST_BYTES = 2**20
_GROUPS = 32
# Denoisers of the checkpoints that are known without a configuration: the shape of the first convolution's weight.
_KNOWN = {"ldm-bedroom": (224, 3), "ldm-church": (192, 4), "ldm-imagenet": (192, 3)}
_WITH_EMA = ("ldm-bedroom", "ldm-church")
_WITH_MEASURED_SCALE = ("ldm-church",)


@dataclass(frozen=True)
class CompVisModel:
    """What a checkpoint holds.

    Attributes:
        architecture: The pipeline in diffusers' terms.
        use_ema: Whether the moving averages are sampled with.
        heads_first: Whether query, key and value of attention blocks are grouped by head (the older order).
        scale_in_checkpoint: Whether the latents' scale was measured in training and lies in the checkpoint.
        known_as: Name of the known model that it is built like.
    """

    architecture: Architecture
    use_ema: bool
    heads_first: bool = True
    scale_in_checkpoint: bool = False
    known_as: str | None = None


def known_model(input_shape: tuple[int, ...]) -> CompVisModel | None:
    """A known checkpoint by the shape `(channels, inputs)` of its first convolution."""
    name = next((name for name, shape in _KNOWN.items() if shape == input_shape), None)
    if name is None:
        return None
    return CompVisModel(
        load_architecture(name), name in _WITH_EMA, scale_in_checkpoint=name in _WITH_MEASURED_SCALE, known_as=name
    )


def read_config(path: Path) -> CompVisModel:
    """Read a configuration.

    Raises:
        InputError: The file is no plain YAML, or describes something else than a latent diffusion model of the
            kinds that are converted.
    """
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise InputError(f"{path} is too large for a configuration.")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} is not readable as plain YAML.") from error
    try:
        model = _model(content["model"]["params"])
    except KeyError as error:
        raise InputError(f"{path} is not the configuration of a latent diffusion model: it has no {error}.") from error
    except (TypeError, ValueError, ZeroDivisionError, IndexError, AttributeError) as error:
        raise InputError(f"{path} is not the configuration of a latent diffusion model: {error}.") from error
    except InputError as error:
        raise InputError(f"{path}: {error.message}") from error
    known = next((name for name in _KNOWN if load_architecture(name) == model.architecture), None)
    return replace(model, known_as=known)


def _model(params: dict[str, Any]) -> CompVisModel:
    unet = params["unet_config"]["params"]
    num_labels = _num_labels(params.get("cond_stage_config"))
    is_conditional = num_labels is not None
    if bool(unet.get("use_spatial_transformer")) != is_conditional:
        raise InputError("only unconditional models, and class-conditional ones with cross-attention, are converted.")
    _require(unet, {"dims": (2, None), "num_classes": (None,), "conv_resample": (True, None)})
    decoder = _autoencoder(params["first_stage_config"], float(params.get("scale_factor", 1.0)))
    scheduler = _scheduler(params)
    if is_conditional:
        components = {"transformer": _conditional_unet(unet), "vae": decoder, "scheduler": scheduler}
    else:
        components = {"unet": _unconditional_unet(unet), "vqvae": decoder, "scheduler": scheduler}
    architecture = Architecture(pipeline="DiTPipeline" if is_conditional else "LDMPipeline", components=components)
    return CompVisModel(
        architecture,
        use_ema=bool(params.get("use_ema", True)),
        heads_first=not unet.get("use_new_attention_order", False),
        scale_in_checkpoint=bool(params.get("scale_by_std", False)),
    )


def _num_labels(condition: Any) -> int | None:
    if condition in (None, "__is_unconditional__"):
        return None
    kind = str(condition["target"]).rpartition(".")[2]
    if kind != "ClassEmbedder":
        raise InputError(f"the condition {kind} is not known; only classes are converted.")
    count = int(condition["params"].get("n_classes", 1000))
    if count != NUM_LABELS:
        raise InputError(f"{count} classes are given; {NUM_LABELS}, the last of them for none, are converted.")
    return count


def _common_unet(unet: dict[str, Any]) -> dict[str, Any]:
    channels = [int(unet["model_channels"]) * int(multiple) for multiple in unet["channel_mult"]]
    return {
        "sample_size": int(unet["image_size"]),
        "in_channels": int(unet["in_channels"]),
        "out_channels": int(unet["out_channels"]),
        "block_out_channels": channels,
        "act_fn": "silu",
        "center_input_sample": False,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5,
        "norm_num_groups": _GROUPS,
        "layers_per_block": int(unet["num_res_blocks"]),
    }


def _attended(unet: dict[str, Any]) -> list[bool]:
    """Whether each level has attention; the levels are named by their down-sampling factor."""
    factors = {int(factor) for factor in unet["attention_resolutions"]}
    return [2**level in factors for level in range(len(unet["channel_mult"]))]


def _unconditional_unet(unet: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    config = _common_unet(unet)
    channels, is_resnet = config["block_out_channels"], bool(unet.get("resblock_updown", False))
    plain = "Resnet{}sampleBlock2D" if is_resnet else "{}Block2D"
    levels = _attended(unet)
    head_size, cls = int(unet.get("num_head_channels", -1)), "diffusers.UNet2DModel"
    if head_size == -1:
        num_heads = int(unet["num_heads"])
        head_size = channels[0] // num_heads
        if any(width != channels[0] for width in channels):
            cls = "edadm_cli.models.latent_diffusion.FixedHeadsUNet"
    resampling = "resnet" if is_resnet else "conv"
    if unet.get("use_scale_shift_norm"):
        config["attn_norm_num_groups"] = _GROUPS  # else diffusers would leave the norm of the mid-block's attention out
    return cls, {
        **config,
        "attention_head_dim": head_size,
        "down_block_types": ["AttnDownBlock2D" if has else plain.format("Down") for has in levels],
        "up_block_types": ["AttnUpBlock2D" if has else plain.format("Up") for has in reversed(levels)],
        "resnet_time_scale_shift": "scale_shift" if unet.get("use_scale_shift_norm") else "default",
        "downsample_type": resampling,
        "upsample_type": resampling,
        "time_embedding_type": "positional",
    }


def _conditional_unet(unet: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    _require(unet, {"use_scale_shift_norm": (False, None), "resblock_updown": (False, None)})
    config, levels = _common_unet(unet), _attended(unet)
    # diffusers calls the number of heads "attention_head_dim" here
    heads: Any = int(unet.get("num_heads", -1))
    if heads == -1:
        heads = [width // int(unet["num_head_channels"]) for width in config["block_out_channels"]]
    depth = int(unet.get("transformer_depth", 1))
    return "edadm_cli.models.latent_diffusion.ClassConditionalUNet", {
        **config,
        "attention_head_dim": heads,
        "cross_attention_dim": int(unet["context_dim"]),
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in levels],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(levels)],
        **({} if depth == 1 else {"transformer_layers_per_block": depth}),
    }


def _autoencoder(stage: dict[str, Any], scale: float) -> tuple[str, dict[str, Any]]:
    kind, params = str(stage["target"]).rpartition(".")[2], stage["params"]
    shape = params["ddconfig"]
    multiples, resolution = shape["ch_mult"], int(shape["resolution"])
    channels = [int(shape["ch"]) * int(multiple) for multiple in multiples]
    attended = [resolution // 2**level in shape["attn_resolutions"] for level in range(len(channels))]
    config: dict[str, Any] = {
        "in_channels": int(shape["in_channels"]),
        "out_channels": int(shape["out_ch"]),
        "latent_channels": int(shape["z_channels"]),
        "block_out_channels": channels,
        "layers_per_block": int(shape["num_res_blocks"]),
        "norm_num_groups": _GROUPS,
        "sample_size": resolution,
        "scaling_factor": scale,
        "down_block_types": ["AttnDownEncoderBlock2D" if has else "DownEncoderBlock2D" for has in attended],
        "up_block_types": ["AttnUpDecoderBlock2D" if has else "UpDecoderBlock2D" for has in reversed(attended)],
    }
    if kind in ("VQModel", "VQModelInterface"):
        config |= {"num_vq_embeddings": int(params["n_embed"]), "vq_embed_dim": int(params["embed_dim"])}
        return "diffusers.VQModel", config
    if kind == "AutoencoderKL":
        if int(params["embed_dim"]) != config["latent_channels"]:
            raise InputError("a KL autoencoder whose embed_dim differs from its z_channels is not converted.")
        return "diffusers.AutoencoderKL", {**config, "act_fn": "silu"}
    raise InputError(f"the first stage {kind} is not known; VQModelInterface and AutoencoderKL are converted.")


def _scheduler(params: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    _require(params, {"beta_schedule": ("linear", None), "parameterization": ("eps", "x0", None)})
    config = {
        "num_train_timesteps": int(params.get("timesteps", 1000)),
        "beta_start": float(params.get("linear_start", 1e-4)),
        "beta_end": float(params.get("linear_end", 2e-2)),
        "beta_schedule": "scaled_linear",  # what CompVis calls linear is linear in the square roots
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }
    if params.get("parameterization") == "x0":
        config["prediction_type"] = "sample"
    return "diffusers.DDIMScheduler", config


def _require(params: dict[str, Any], allowed: dict[str, tuple[Any, ...]]) -> None:
    for name, values in allowed.items():
        if params.get(name) not in values:
            raise InputError(f"{name}: {params[name]} is not converted.")
