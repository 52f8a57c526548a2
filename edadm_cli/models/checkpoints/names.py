"""Maps the names of parameters of diffusers' modules to their names in a CompVis checkpoint.

In a checkpoint, an attention block keeps query, key and value in one tensor, to which all three names of diffusers are
mapped.
"""

from __future__ import annotations

import re

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ATTENTION_BLOCK = {"group_norm": "norm", "to_q": "qkv", "to_k": "qkv", "to_v": "qkv", "to_out.0": "proj_out"}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_AUTOENCODER_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_PLACE = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def unet_name(name: str, num_res_blocks: int, has_attention: bool) -> str:
    """Returns the name of a UNet's parameter below `model.diffusion_model.`.

    Args:
        name: The parameter's name in diffusers.
        num_res_blocks: The number of residual blocks per level of the down path.
        has_attention: Whether the parameter's level has attention, which comes before the level's upsampling.
    """
    stem, _, leaf = name.rpartition(".")
    if stem in _UNET_ENDS:
        return f"{_UNET_ENDS[stem]}.{leaf}"
    middle = _MIDDLE.fullmatch(name)
    if middle:
        kind, index, rest = middle.groups()
        place = f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}"
        return f"{place}.{_inside(kind, rest)}"
    match = _PLACE.fullmatch(name)
    if match is None:
        raise KeyError(name)
    way, block, kind, index, rest = match.groups()
    first = int(block) * (num_res_blocks + 1)
    if kind == "downsamplers":
        place = f"input_blocks.{first + num_res_blocks + 1}.0"
        return f"{place}.{_resampler(rest, 'op')}"
    if kind == "upsamplers":
        place = f"output_blocks.{first + num_res_blocks}.{2 if has_attention else 1}"
        return f"{place}.{_resampler(rest, 'conv')}"
    number = first + int(index) + (1 if way == "down" else 0)
    place = f"{'input' if way == 'down' else 'output'}_blocks.{number}.{1 if kind == 'attentions' else 0}"
    return f"{place}.{_inside(kind, rest)}"


def level_of(name: str) -> str | None:
    """Returns the level that a UNet's parameter belongs to, such as `up_blocks.0`; `None` if it belongs to none."""
    match = _PLACE.fullmatch(name)
    return f"{match[1]}_blocks.{match[2]}" if match else None


def autoencoder_name(name: str, num_levels: int) -> str:
    """Returns the name of an autoencoder's parameter below `first_stage_model.`."""
    half, _, rest = name.partition(".")
    if half not in ("encoder", "decoder"):
        return name
    rest = rest.replace("conv_norm_out", "norm_out")
    middle = _MIDDLE.fullmatch(rest)
    if middle:
        kind, index, inner = middle.groups()
        part = "block" if kind == "resnets" else "attn"
        return f"{half}.mid.{part}_{int(index) + 1}.{_inside_autoencoder(kind, inner)}"
    match = _PLACE.fullmatch(rest)
    if match is None:
        return f"{half}.{rest}"
    way, block, kind, index, inner = match.groups()
    level = int(block) if way == "down" else num_levels - 1 - int(block)
    if kind in ("downsamplers", "upsamplers"):
        return f"{half}.{way}.{level}.{way}sample.{inner}"
    part = "block" if kind == "resnets" else "attn"
    return f"{half}.{way}.{level}.{part}.{index}.{_inside_autoencoder(kind, inner)}"


def ema_name(name: str) -> str:
    """Returns the name of the moving average of a denoiser's parameter `model.diffusion_model.*`."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def _inside(kind: str, rest: str) -> str:
    if kind == "resnets":
        return _renamed(rest, _RESNET)
    is_block = rest.rpartition(".")[0] in _ATTENTION_BLOCK
    return _renamed(rest, _ATTENTION_BLOCK) if is_block else rest  # spatial transformers have the same names


def _inside_autoencoder(kind: str, rest: str) -> str:
    return _renamed(rest, _AUTOENCODER_ATTENTION if kind == "attentions" else {"conv_shortcut": "nin_shortcut"})


def _resampler(rest: str, convolution: str) -> str:
    """Returns the name of a parameter of a resampling convolution, or of a residual block that resamples."""
    stem, _, leaf = rest.rpartition(".")
    return f"{convolution}.{leaf}" if stem == "conv" else _renamed(rest, _RESNET)


def _renamed(rest: str, names: dict[str, str]) -> str:
    stem, _, leaf = rest.rpartition(".")
    return f"{names.get(stem, stem)}.{leaf}"
