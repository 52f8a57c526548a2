r"""Writes a quantized denoiser as ComfyUI's `int8_tensorwise` tensors.

A linear layer becomes three tensors: `X.weight` (int8, `[C_out, C_in]`), `X.weight_scale` (float32, `[C_out, 1]`), and
`X.comfy_quant` (the bytes of a JSON object that names the format). ComfyUI quantizes inputs itself, row by row, so that
the file does not contain the input scales of the export. Codes of fewer than eight bits are stored in eight. Everything
else, convolutions included, is float16.

A rotation of the input by regular Hadamard matrices is ComfyUI's "convrot", which `X.comfy_quant` names with the size
of the groups. ComfyUI has no other transforms: where a layer's input channels have scales, its weight is stored without
them, in float16.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from edadm_cli.artifacts import save_tensors
from edadm_cli.errors import InputError
from edadm_cli.integrations.comfyui.names import PREFIX, Source, original_names
from edadm_cli.quant.layers import QuantizedLayer
from edadm_cli.quant.split_layer import SplitLayer
from edadm_cli.quant.transforms import HadamardRotation

FORMAT = "int8_tensorwise"
FILE = "denoiser.safetensors"


class ComfyUiFile:
    """Writes the file of a denoiser for ComfyUI's folder `models/diffusion_models`."""

    name: ClassVar[str] = "comfyui"
    files_format: ClassVar[int] = 1

    def save(self, denoiser: nn.Module, args: Any, kwargs: Any, options: Any, folder: Path) -> None:
        """Writes `denoiser.safetensors` into a folder; the example call and the options are not needed.

        Raises:
            InputError: ComfyUI's names of this denoiser are not known.
        """
        save_tensors(folder / FILE, comfyui_state(denoiser))


@dataclass(frozen=True)
class _Codes:
    """The weight of a linear layer in eight-bit codes: weight = codes * scale, rotated where there is a rotation."""

    codes: Tensor  # int8 [C_out, C_in]
    scale: Tensor  # float32 [C_out]
    rotation: HadamardRotation | None = None

    @property
    def rotated_channels(self) -> int:
        """Returns the number of input channels that are rotated together; 1 without a rotation."""
        return 1 if self.rotation is None else self.rotation.size(self.codes.shape[1])

    def dequantized(self) -> Tensor:
        weight = self.codes.float() * self.scale[:, None]
        return weight if self.rotation is None else self.rotation.fold(weight, {})  # a rotation is its own inverse


def comfyui_state(denoiser: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors of ComfyUI's file of a denoiser, by name.

    Args:
        denoiser: A quantized denoiser, on any device.

    Raises:
        InputError: ComfyUI's names of this denoiser are not known.
    """
    tensors = _float_names(denoiser)
    state: dict[str, Tensor] = {}
    for name, source in original_names(denoiser, tensors).items():
        values = [tensors[part] for part in source.names]
        codes = [value for value in values if isinstance(value, _Codes)]
        if len(codes) == len(values) and len({part.rotated_channels for part in codes}) == 1:
            state.update(_quantized(PREFIX + name, codes, source))
        else:
            floats = [value.dequantized() if isinstance(value, _Codes) else value for value in values]
            state[PREFIX + name] = _arranged(floats, source).to(torch.float16).contiguous()
    return state


def _quantized(name: str, parts: Sequence[_Codes], source: Source) -> dict[str, Tensor]:
    stem = name.removesuffix(".weight")
    group = parts[0].rotated_channels
    rotation = {"convrot": True, "convrot_groupsize": group} if group > 1 else {}
    about = json.dumps({"format": FORMAT, **rotation}, separators=(",", ":")).encode()
    return {
        name: _arranged([part.codes for part in parts], source).contiguous(),
        f"{stem}.weight_scale": _arranged([part.scale for part in parts], source)[:, None].contiguous(),
        f"{stem}.comfy_quant": torch.tensor(list(about), dtype=torch.uint8),
    }


def _arranged(parts: Sequence[Tensor], source: Source) -> Tensor:
    joined = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
    return torch.cat(joined.chunk(2)[::-1]) if source.swaps_halves else joined


def _float_names(denoiser: nn.Module) -> dict[str, Tensor | _Codes]:
    """Returns every parameter under its name in a float denoiser, quantized weights as codes where possible."""
    tensors: dict[str, Tensor | _Codes] = {}
    inside: tuple[str, ...] = ()
    for name, module in denoiser.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, QuantizedLayer | SplitLayer):
            inside += (f"{name}.",)
            tensors[f"{name}.weight"] = _weight(module)
            bias = module.bias if isinstance(module, QuantizedLayer) else module.parts[0].bias
            if isinstance(bias, Tensor):
                tensors[f"{name}.bias"] = bias.detach().cpu()
            continue
        parameters = [*module.named_parameters(recurse=False), *_persistent_buffers(module)]
        tensors.update({f"{name}.{key}" if name else key: value.detach().cpu() for key, value in parameters})
    return tensors


def _persistent_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    hidden = module._non_persistent_buffers_set
    return [(key, buffer) for key, buffer in module.named_buffers(recurse=False) if key not in hidden]


def _weight(layer: QuantizedLayer | SplitLayer) -> Tensor | _Codes:
    if isinstance(layer, SplitLayer):
        parts = [_float_weight(part) for part in layer.parts if isinstance(part, QuantizedLayer)]
        return torch.cat(parts, dim=1)
    transform = layer.transform
    if len(layer.weight_shape) == 2 and (transform is None or isinstance(transform, HadamardRotation)):
        return _Codes(layer.weight_int.cpu(), layer.weight_scale.float().cpu(), transform)
    return _float_weight(layer)


def _float_weight(layer: QuantizedLayer) -> Tensor:
    """Returns the weight `[C_out, ...]` for an input without the layer's transform."""
    scale = layer.weight_scale.float().reshape(-1, *[1] * (len(layer.weight_shape) - 1))
    weight = (layer.weight_int.float() * scale).cpu()
    transform = layer.transform
    if transform is None:
        return weight
    tensors = {name: getattr(layer, name).cpu() for name in layer.transform_tensors}
    factors = transform.channel_factors(tensors)
    if factors is not None:
        return weight * factors.reshape(-1, *[1] * (weight.ndim - 2))
    if isinstance(transform, HadamardRotation):
        return transform.fold(weight, tensors)
    raise InputError(
        f"ComfyUI's format has no place for the transform '{transform.name}'.",
        hint="edadm reconstruct with a recipe without it",
    )
