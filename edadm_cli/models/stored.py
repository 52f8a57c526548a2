"""Denoisers whose large weights stay where they are stored, and are brought to the device whenever they are used.

A layer whose weight is stored has no parameter of that name: each use of `layer.weight` reads it from its file, or
makes it anew for a model with random weights, in float32 on the device. One layer's weight at a time is in memory
then. Everything else, such as norms, biases and embeddings, is loaded as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from edadm_cli.artifacts import read_tensor_header
from edadm_cli.errors import InputError

Reader = Callable[[torch.device], Tensor]
"""Returns a tensor in float32 on a device."""

_READER = "stored_weight"
_PLACE = "stored_weight_device"
_NAME = "stored_weight_name"
_SHAPE = "stored_weight_shape"


def file_readers(files: tuple[Path, ...]) -> dict[str, Reader]:
    """Returns a reader for every tensor of some safetensors files, by name."""
    return {name: partial(_read, file, name) for file in files for name in read_tensor_header(file)}


def place_stored(denoiser: nn.Module, readers: Mapping[str, Reader], device: torch.device) -> None:
    """Fills a denoiser that was built without memory: linear layers and convolutions read their weights when used.

    Args:
        denoiser: Its parameters are on the `meta` device; buffers hold their values.
        readers: One for each parameter, by name.
        device: Where it computes.

    Raises:
        InputError: A parameter has no reader, or another shape than what is read. The shape of a weight that stays
            where it is stored is compared whenever it is read.
    """
    for name, module in denoiser.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            full = f"{name}.{key}" if name else key
            if full not in readers:
                raise InputError(f"The model's files hold no tensor '{full}', which its denoiser needs.")
            if key == "weight" and isinstance(module, nn.Linear | nn.Conv2d):
                _store(module, full, readers[full], device)
                continue
            values = _of_shape(readers[full](device), parameter.shape, full)
            setattr(module, key, nn.Parameter(values, requires_grad=False))
    for name, module in denoiser.named_modules():
        for key, buffer in list(module.named_buffers(recurse=False)):
            reader = readers.get(f"{name}.{key}" if name else key)
            setattr(module, key, buffer.to(device) if reader is None else reader(device).to(buffer.dtype))
    denoiser.eval().requires_grad_(False)


def is_stored(module: nn.Module) -> bool:
    """Returns whether the weight of a layer is read when it is used."""
    return _READER in vars(module)


def num_weights(layer: nn.Module) -> int:
    """Returns the number of the elements of a layer's weight, which is not read for it."""
    return vars(layer)[_SHAPE].numel() if is_stored(layer) else layer.get_parameter("weight").numel()


def _store(layer: nn.Module, name: str, reader: Reader, device: torch.device) -> None:
    shape = layer.get_parameter("weight").shape
    del layer._parameters["weight"]
    cls: Any = type(layer)
    layer.__class__ = _stored_class(cls)
    vars(layer).update({_READER: reader, _PLACE: device, _NAME: name, _SHAPE: shape})


@cache
def _stored_class(cls: Any) -> Any:
    """Returns a layer class whose weight is read from disk; it has the plain class's name, which identifies layers."""
    return type(cls.__name__, (cls,), {"weight": property(_weight), "__module__": cls.__module__})


def _weight(layer: nn.Module) -> Tensor:
    facts = vars(layer)
    return _of_shape(facts[_READER](facts[_PLACE]), facts[_SHAPE], facts[_NAME])


def _of_shape(values: Tensor, shape: torch.Size, name: str) -> Tensor:
    if values.shape != shape:
        raise InputError(f"'{name}' has shape {list(values.shape)}, expected {list(shape)}.")
    return values


def _read(file: Path, name: str, device: torch.device) -> Tensor:
    with safe_open(file, framework="pt", device="cpu") as opened:
        values: Tensor = opened.get_tensor(name)
    return values.to(device).float().clone() if device.type == "cpu" else values.to(device).float()
