r"""Dequantizes ComfyUI's eight-bit files: integers, including rotated ones, and float8 with scales.

A weight of float8 is multiplied by its scale. Files of earlier versions of ComfyUI name the scale `scale_weight` and
hold a tensor `scaled_fp8`; later ones name it `weight_scale`. The scales of inputs (`scale_input`, `input_scale`) are
for products in float8 and are left out.

A rotated ("convrot") weight is W' = W H^T for groups of g input channels, where H is the regular Hadamard matrix of
size g: the Kronecker power of [[1,1,1,-1],[1,1,-1,1],[1,-1,1,1],[-1,1,1,1]], divided by the square root of g. H is
orthogonal, so W = W' H.

References:
    ConvRot, arXiv 2512.03673 (regular Hadamard rotation by groups).
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from edadm_cli.errors import InputError, explain_field
from edadm_cli.integrations.comfyui.writing import FORMAT
from edadm_cli.quant.transforms import regular_hadamard

_MARK = ".comfy_quant"
_FLOAT8 = "float8_e4m3fn"
_FLOAT8_TYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_WEIGHT_SCALES = (".scale_weight", ".weight_scale")
_OTHERS = (".scale_input", ".input_scale", "scaled_fp8")
"""Ends of the names of tensors beside float8 weights that do not change them."""
_MAX_ABOUT_BYTES = 4096


class _About(BaseModel):
    """The content of `X.comfy_quant`, which describes the format of a layer."""

    model_config = ConfigDict(extra="ignore")

    format: str
    convrot: bool = False
    convrot_groupsize: int = Field(256, ge=4, le=4096)  # the matrix of the largest size takes 64 MiB


def is_quantized_state(state: Mapping[str, Tensor]) -> bool:
    """Returns whether these are the tensors of a file with ComfyUI's quantized layers, whole or not."""
    return any(
        name.endswith((_MARK, "scaled_fp8")) or _is_codes(name, tensor) or _weight_of(name, state) is not None
        for name, tensor in state.items()
    )


def _weight_of(name: str, state: Mapping[str, Tensor]) -> str | None:
    """Returns the name of the float8 weight that a tensor is the scale of; `None` if it is none."""
    for ending in _WEIGHT_SCALES:
        weight = f"{name.removesuffix(ending)}.weight"
        if name.endswith(ending) and weight in state and state[weight].dtype in _FLOAT8_TYPES:
            return weight
    return None


def _is_codes(name: str, tensor: Tensor) -> bool:
    return name.endswith(".weight") and tensor.dtype == torch.int8


def dequantized_state(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Returns the tensors with every quantized weight in float32, and without scales and descriptions of formats.

    Args:
        state: Tensors of a file by name.
        where: The file's path, for messages.

    Raises:
        InputError: A layer has another format than `int8_tensorwise` or float8, its tensors do not fit each other, or
            the description of its format is missing.
    """
    result = _float8_scaled(state, where)
    for name in state:
        if name not in result or not name.endswith(_MARK):
            continue
        stem = name.removesuffix(_MARK)
        about = _about(result.pop(name), f"{where}: '{name}'")
        weight, scale = result.get(f"{stem}.weight"), result.pop(f"{stem}.weight_scale", None)
        result.pop(f"{stem}.input_scale", None)  # ComfyUI quantizes inputs with one scale per token
        if weight is None or scale is None or weight.dtype != torch.int8 or weight.ndim != 2:
            raise InputError(f"{where}: '{stem}' needs an int8 'weight' of two dimensions and a 'weight_scale'.")
        if scale.numel() not in (1, len(weight)) or not bool(scale.float().isfinite().all()):
            raise InputError(
                f"{where}: '{stem}.weight_scale' must hold one finite number, or one per row of {len(weight)};"
                f" its shape is {list(scale.shape)}."
            )
        value = weight.float() * scale.float().reshape(-1, 1)
        if about.convrot:
            value = _unrotated(value, about.convrot_groupsize, f"{where}: '{stem}'")
        result[f"{stem}.weight"] = value
    unmarked = next((name for name, tensor in result.items() if _is_codes(name, tensor)), None)
    if unmarked is not None:
        raise InputError(
            f"{where}: '{unmarked}' holds int8 codes, and the tensor '{unmarked.removesuffix('.weight')}{_MARK}', which"
            " says how to read them, is missing."
        )
    return result


def _float8_scaled(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Returns the tensors with every scaled float8 weight in float32, without what describes it."""
    result = dict(state)
    for name, scale in state.items():
        weight = _weight_of(name, state)
        if weight is None:
            continue
        values = state[weight].float()
        rows = values.shape[:1].numel()  # 1 for a single number, which a damaged file may hold
        if scale.numel() not in (1, rows) or not bool(scale.float().isfinite().all()):
            raise InputError(
                f"{where}: '{name}' must hold one finite number, or one per row of {rows}; its shape is"
                f" {list(scale.shape)}."
            )
        stem = weight.removesuffix(".weight")
        mark = result.pop(f"{stem}{_MARK}", None)
        if mark is not None and _about(mark, f"{where}: '{stem}{_MARK}'").format != _FLOAT8:
            raise InputError(f"{where}: '{weight}' is float8, and '{stem}{_MARK}' calls it '{FORMAT}'.")
        result[weight] = values * scale.float().reshape(-1, *[1] * (values.ndim - 1))
        result.pop(name)
    if len(result) < len(state) or any(name.endswith("scaled_fp8") for name in state):
        result = {name: tensor for name, tensor in result.items() if not name.endswith(_OTHERS)}
    return result


def _about(tensor: Tensor, where: str) -> _About:
    if tensor.dtype != torch.uint8 or tensor.numel() > _MAX_ABOUT_BYTES:
        raise InputError(f"{where} must hold the bytes of a short JSON object.")
    try:
        about = _About.model_validate(json.loads(bytes(tensor.flatten().tolist())))
    except ValidationError as error:
        raise InputError(f"{where} is not understood: {explain_field(error.errors()[0])}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} must hold the bytes of a JSON object.") from error
    if about.format not in (FORMAT, _FLOAT8):
        raise InputError(f"{where} has the format '{about.format[:40]}'; only '{FORMAT}' and '{_FLOAT8}' can be read.")
    return about


def _unrotated(weight: Tensor, group_size: int, where: str) -> Tensor:
    if weight.shape[1] % group_size or 4 ** round(torch.tensor(float(group_size)).log2().item() / 2) != group_size:
        raise InputError(
            f"{where} is rotated in groups of {group_size} channels, which must be a power of 4 that divides"
            f" {weight.shape[1]}."
        )
    grouped = weight.reshape(len(weight), -1, group_size)
    return (grouped @ regular_hadamard(group_size)).reshape(weight.shape)
