"""Reads the `config.yaml` of a CompVis latent-diffusion checkpoint as data. It instantiates no class named in it.

References:
    Latent Diffusion, arXiv 2112.10752, and the configurations of its repository.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edadm_cli.errors import InputError
from edadm_cli.models.architecture import Architecture, load_architecture
from edadm_cli.plain_data import read_yaml

CONFIG_NAME = "config.yaml"
NUM_LABELS = 1001  # as in `latent_diffusion`, which is heavy to import
_GROUPS = 32
# The largest model that is built; these bounds are far above every published model.
_MAX_LEVELS, _MAX_MULTIPLE, _MAX_LAYERS = 16, 64, 64
_MAX_WIDTH, _MAX_PIXELS, _MAX_CODES, _MAX_TIMESTEPS = 65_536, 65_536, 10_000_000, 100_000
# The checkpoints that are known without a configuration, by the output and input channels of their first convolution.
_KNOWN = {"ldm-bedroom": (224, 3), "ldm-church": (192, 4), "ldm-imagenet": (192, 3)}
_WITH_EMA = ("ldm-bedroom", "ldm-church")
_WITH_MEASURED_SCALE = ("ldm-church",)


@dataclass(frozen=True)
class CompVisModel:
    """Describes the model that a checkpoint holds.

    Attributes:
        architecture: The classes and configurations of the pipeline in diffusers.
        use_ema: Whether images are sampled with the moving averages of the denoiser's weights.
        heads_first: Whether query, key and value of attention blocks are grouped by head first (the older order).
        scale_in_checkpoint: Whether the checkpoint holds a tensor with the measured scale of the latents.
        known_as: The name of the known model that has the same architecture.
    """

    architecture: Architecture
    use_ema: bool
    heads_first: bool = True
    scale_in_checkpoint: bool = False
    known_as: str | None = None


def known_model(input_shape: tuple[int, ...]) -> CompVisModel | None:
    """Returns the known model whose first convolution has the channels `(outputs, inputs)`; `None` if none has."""
    name = next((name for name, shape in _KNOWN.items() if shape == input_shape), None)
    if name is None:
        return None
    return CompVisModel(
        load_architecture(name), name in _WITH_EMA, scale_in_checkpoint=name in _WITH_MEASURED_SCALE, known_as=name
    )


def read_config(path: Path) -> CompVisModel:
    """Reads a configuration.

    Raises:
        InputError: The file is not plain YAML, has values that no such model has, or describes a model that is not a
            latent diffusion model of a supported kind.
    """
    content = read_yaml(path, "The configuration")
    try:
        model = _model(content["model"]["params"])
    except KeyError as error:
        raise InputError(f"{path} is not the configuration of a latent diffusion model: it has no {error}.") from error
    except (TypeError, ValueError, ArithmeticError, IndexError, AttributeError) as error:
        raise InputError(f"{path} is not the configuration of a latent diffusion model: {error}.") from error
    except InputError as error:
        raise InputError(f"{path}: {error.message}") from error
    known = next((name for name in _KNOWN if load_architecture(name) == model.architecture), None)
    return replace(model, known_as=known)


def _model(params: dict[str, Any]) -> CompVisModel:
    """Returns what the parameters of a latent diffusion model describe."""
    unet = params["unet_config"]["params"]
    num_labels = _num_labels(params.get("cond_stage_config"))
    if bool(unet.get("use_spatial_transformer")) != (num_labels is not None):
        raise InputError("only unconditional models, and class-conditional ones with cross-attention, are converted.")
    _require(unet, {"dims": (2, None), "num_classes": (None,), "conv_resample": (True, None)})
    decoder = _autoencoder(params["first_stage_config"], _real(params, "scale_factor", 1.0, 1e6))
    scheduler = _scheduler(params)
    if num_labels is not None:
        components = {"transformer": _conditional_unet(unet, num_labels), "vae": decoder, "scheduler": scheduler}
    else:
        components = {"unet": _unconditional_unet(unet), "vqvae": decoder, "scheduler": scheduler}
    architecture = Architecture(pipeline="LDMPipeline" if num_labels is None else "DiTPipeline", components=components)
    return CompVisModel(
        architecture,
        use_ema=bool(params.get("use_ema", True)),
        heads_first=not unet.get("use_new_attention_order", False),
        scale_in_checkpoint=bool(params.get("scale_by_std", False)),
    )


def _num_labels(condition: Any) -> int | None:
    """Returns the number of class embeddings; the last one means "no class". `None` means an unconditional model."""
    if condition in (None, "__is_unconditional__"):
        return None
    kind = str(condition["target"]).rpartition(".")[2]
    if kind != "ClassEmbedder":
        raise InputError(f"the condition {kind} is not known; only classes are converted.")
    count = _whole(condition["params"], "n_classes", _MAX_CODES, default=1000)
    if count == 1:
        raise InputError("n_classes is 1; a class and one more embedding, that of no class, were expected.")
    return count


def _whole(params: dict[str, Any], name: str, largest: int, default: int | None = None) -> int:
    """Returns a positive integer of a configuration, at most `largest`."""
    return _positive(params[name] if default is None else params.get(name, default), name, largest)


def _positive(value: Any, name: str, largest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
        raise InputError(f"{name} is {value!r}; an integer from 1 to {largest} was expected.")
    return value


def _multiples(params: dict[str, Any], name: str) -> list[int]:
    """Returns the width of each level, as a multiple of the model's base width."""
    values = params[name]
    if not isinstance(values, list) or not 1 <= len(values) <= _MAX_LEVELS:
        raise InputError(f"{name} is not a list of 1 to {_MAX_LEVELS} numbers.")
    return [_positive(value, name, _MAX_MULTIPLE) for value in values]


def _real(params: dict[str, Any], name: str, default: float, largest: float) -> float:
    """Returns a positive number of a configuration, at most `largest`."""
    value = params.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= largest:
        raise InputError(f"{name} is {value!r}; a number above 0 and up to {largest:g} was expected.")
    return float(value)


def _common_unet(unet: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of a UNet's configuration in diffusers that both kinds of UNet share."""
    width = _whole(unet, "model_channels", _MAX_WIDTH)
    channels = [width * multiple for multiple in _multiples(unet, "channel_mult")]
    return {
        "sample_size": _whole(unet, "image_size", _MAX_PIXELS),
        "in_channels": _whole(unet, "in_channels", _MAX_WIDTH),
        "out_channels": _whole(unet, "out_channels", _MAX_WIDTH),
        "block_out_channels": channels,
        "act_fn": "silu",
        "center_input_sample": False,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5,
        "norm_num_groups": _GROUPS,
        "layers_per_block": _whole(unet, "num_res_blocks", _MAX_LAYERS),
    }


def _attended(unet: dict[str, Any]) -> list[bool]:
    """Returns whether each level has attention; the configuration names levels by their downsampling factor."""
    factors = {int(factor) for factor in unet["attention_resolutions"]}
    return [2**level in factors for level in range(len(unet["channel_mult"]))]


def _unconditional_unet(unet: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns the class and the configuration, in diffusers, of a UNet without a condition."""
    config = _common_unet(unet)
    channels, is_resnet = config["block_out_channels"], bool(unet.get("resblock_updown", False))
    plain = "Resnet{}sampleBlock2D" if is_resnet else "{}Block2D"
    levels = _attended(unet)
    head_size, cls = unet.get("num_head_channels", -1), "diffusers.UNet2DModel"
    if head_size != -1:
        head_size = _positive(head_size, "num_head_channels", _MAX_WIDTH)
    else:
        num_heads = _whole(unet, "num_heads", _MAX_WIDTH)
        head_size = channels[0] // num_heads
        if any(width != channels[0] for width in channels):
            cls = "edadm_cli.models.latent_diffusion.FixedHeadsUNet"
    resampling = "resnet" if is_resnet else "conv"
    if unet.get("use_scale_shift_norm"):
        config["attn_norm_num_groups"] = _GROUPS  # otherwise diffusers omits the norm of the mid-block's attention
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


def _conditional_unet(unet: dict[str, Any], num_labels: int) -> tuple[str, dict[str, Any]]:
    """Returns the class and the configuration of a UNet whose cross-attention sees the embedding of a class."""
    _require(unet, {"use_scale_shift_norm": (False, None), "resblock_updown": (False, None)})
    config, levels = _common_unet(unet), _attended(unet)
    # diffusers calls the number of heads "attention_head_dim" here
    heads: Any = unet.get("num_heads", -1)
    if heads == -1:
        head_size = _whole(unet, "num_head_channels", _MAX_WIDTH)
        heads = [width // head_size for width in config["block_out_channels"]]
    else:
        heads = _positive(heads, "num_heads", _MAX_WIDTH)
    depth = _whole(unet, "transformer_depth", _MAX_LAYERS, default=1)
    return "edadm_cli.models.latent_diffusion.ClassConditionalUNet", {
        **config,
        "attention_head_dim": heads,
        "cross_attention_dim": _whole(unet, "context_dim", _MAX_WIDTH),
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in levels],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(levels)],
        **({} if depth == 1 else {"transformer_layers_per_block": depth}),
        **({} if num_labels == NUM_LABELS else {"num_labels": num_labels}),
    }


def _autoencoder(stage: dict[str, Any], scale: float) -> tuple[str, dict[str, Any]]:
    """Returns the class and the configuration, in diffusers, of an autoencoder with this scale of its latents."""
    kind, params = str(stage["target"]).rpartition(".")[2], stage["params"]
    shape = params["ddconfig"]
    multiples = _multiples(shape, "ch_mult")
    resolution, width = _whole(shape, "resolution", _MAX_PIXELS), _whole(shape, "ch", _MAX_WIDTH)
    channels = [width * multiple for multiple in multiples]
    attended = [resolution // 2**level in shape["attn_resolutions"] for level in range(len(channels))]
    config: dict[str, Any] = {
        "in_channels": _whole(shape, "in_channels", _MAX_WIDTH),
        "out_channels": _whole(shape, "out_ch", _MAX_WIDTH),
        "latent_channels": _whole(shape, "z_channels", _MAX_WIDTH),
        "block_out_channels": channels,
        "layers_per_block": _whole(shape, "num_res_blocks", _MAX_LAYERS),
        "norm_num_groups": _GROUPS,
        "sample_size": resolution,
        "scaling_factor": scale,
        "down_block_types": ["AttnDownEncoderBlock2D" if has else "DownEncoderBlock2D" for has in attended],
        "up_block_types": ["AttnUpDecoderBlock2D" if has else "UpDecoderBlock2D" for has in reversed(attended)],
    }
    if kind in ("VQModel", "VQModelInterface"):
        config |= {
            "num_vq_embeddings": _whole(params, "n_embed", _MAX_CODES),
            "vq_embed_dim": _whole(params, "embed_dim", _MAX_WIDTH),
        }
        return "diffusers.VQModel", config
    if kind == "AutoencoderKL":
        if params["embed_dim"] != config["latent_channels"]:
            raise InputError("a KL autoencoder whose embed_dim differs from its z_channels is not converted.")
        return "diffusers.AutoencoderKL", {**config, "act_fn": "silu"}
    raise InputError(f"the first stage {kind} is not known; VQModelInterface and AutoencoderKL are converted.")


def _scheduler(params: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns the class and the configuration, in diffusers, of the scheduler of a model."""
    _require(params, {"beta_schedule": ("linear", None), "parameterization": ("eps", "x0", None)})
    config = {
        "num_train_timesteps": _whole(params, "timesteps", _MAX_TIMESTEPS, default=1000),
        "beta_start": _real(params, "linear_start", 1e-4, 1.0),
        "beta_end": _real(params, "linear_end", 2e-2, 1.0),
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
