r"""Reads LoRA files of Stable Diffusion 3 in kohya's names, which diffusers reads for other models only.

A name is that of a module of the published checkpoint with underscores for dots, behind `lora_unet_`. A module of the
checkpoint may be several layers of diffusers, joined along their outputs (query, key and value):

    y_i = B_i (A x) alpha / rank,

where B_i are the rows of `lora_up` that belong to layer i, and A is `lora_down`, which all of them share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.errors import InputError
from edadm_cli.integrations.comfyui.names import Source, original_names
from edadm_cli.quant.layers import QuantizedLayer
from edadm_cli.quant.split_layer import SplitLayer

_DENOISER = "lora_unet_"
_TEXT_ENCODERS = {"lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
_T5 = "lora_te3_"
_DOWN, _UP, _ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"


def needs_renaming(pipeline: Any, tensors: Mapping[str, Tensor]) -> bool:
    """Returns whether a LoRA file has kohya's names, and the pipeline is one for which diffusers does not know them."""
    is_sd3 = type(getattr(pipeline, "transformer", None)).__name__ == "SD3Transformer2DModel"
    return is_sd3 and any(name.startswith((_DENOISER, *_TEXT_ENCODERS)) for name in tensors)


def in_diffusers_names(pipeline: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a LoRA of Stable Diffusion 3 under the names by which diffusers loads them.

    Args:
        pipeline: A pipeline of Stable Diffusion 3, quantized or not.
        tensors: The tensors of a file with kohya's names.

    Raises:
        InputError: A tensor belongs to no layer of the pipeline, is missing, or has another number of rows.
    """
    layers = {f"transformer.{name}": module for name, module in _layers(pipeline.transformer)}
    sources = _sources(pipeline)
    result: dict[str, Tensor] = {}
    for stem in dict.fromkeys(name.partition(".")[0] for name in tensors):
        source = sources.get(stem)
        if stem.startswith(_T5):
            raise InputError(f"'{stem}' is a layer of T5, for which diffusers loads no adapter.")
        if source is None:
            raise InputError(f"'{stem}' is no layer of {type(pipeline).__name__}.")
        down, up = (_tensor(tensors, f"{stem}{end}") for end in (_DOWN, _UP))
        up = up * (float(tensors.get(f"{stem}{_ALPHA}", len(down))) / len(down))
        if source.swaps_halves:
            up = torch.cat(up.chunk(2)[::-1])
        rows = [len(up)] if len(source.names) == 1 else [_rows(layers[name]) for name in source.names]
        if sum(rows) != len(up):
            raise InputError(f"'{stem}{_UP}' has {len(up)} rows; its layers have {sum(rows)}.")
        for name, part in zip(source.names, up.split(rows), strict=True):
            result[f"{name}.lora_A.weight"] = down
            result[f"{name}.lora_B.weight"] = part.contiguous()
    return result


def _sources(pipeline: Any) -> dict[str, Source]:
    """Returns the layers of diffusers that each of kohya's names stands for."""
    names = [f"{name}.weight" for name, _ in _layers(pipeline.transformer)]
    sources = {}
    for original, source in original_names(pipeline.transformer, names).items():
        parts = tuple(f"transformer.{name.removesuffix('.weight')}" for name in source.names)
        sources[_DENOISER + _underscored(original.removesuffix(".weight"))] = Source(parts, source.swaps_halves)
    for prefix, component in _TEXT_ENCODERS.items():
        for name, _ in _layers(getattr(pipeline, component)):
            # the library transformers has dropped the level `text_model` from CLIP, and kohya's names have it
            inner = name.removeprefix("text_model.")
            sources[f"{prefix}text_model_{_underscored(inner)}"] = Source((f"{component}.{name}",))
    return sources


def _layers(model: nn.Module | None) -> Iterator[tuple[str, nn.Module]]:
    """Yields the layers that can have an adapter, by the names that they have without one."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules() if model is not None else ():
        layer = getattr(module, "base_layer", module)  # PEFT wraps a layer that has an adapter already
        if isinstance(layer, nn.Linear | nn.Conv2d | QuantizedLayer | SplitLayer) and not name.startswith(inside):
            inside += (f"{name}.",)
            yield name, layer


def _rows(layer: nn.Module) -> int:
    if isinstance(layer, SplitLayer):
        return _rows(layer.parts[0])
    return layer.weight_shape[0] if isinstance(layer, QuantizedLayer) else len(layer.get_parameter("weight"))


def _tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise InputError(f"'{name}' is missing.")
    return tensors[name]


def _underscored(name: str) -> str:
    return name.replace(".", "_")
