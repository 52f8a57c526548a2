"""Denoisers whose large weights stay where they are stored, and are brought to the device whenever they are used.

A layer whose weight is stored has no parameter of that name: each use of `layer.weight` reads it from its file, or
makes it anew for a model with random weights, on the device and in the element type of the denoiser. One layer's weight
at a time is in memory then. Everything else, such as norms, biases and embeddings, is loaded as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from edadm_cli.artifacts import read_tensor_header
from edadm_cli.errors import InputError

Reader = Callable[[torch.device, torch.dtype], Tensor]
"""Returns a tensor on a device, in an element type."""

_READER = "stored_weight"
_PLACE = "stored_weight_place"
_NAME = "stored_weight_name"
_SHAPE = "stored_weight_shape"


def file_readers(files: tuple[Path, ...]) -> dict[str, Reader]:
    """Returns a reader for every tensor of some safetensors files, by name."""
    return {name: partial(_read, file, name) for file in files for name in read_tensor_header(file)}


def place_stored(
    denoiser: nn.Module,
    readers: Mapping[str, Reader],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    float32: Collection[str] = (),
) -> None:
    """Fills a denoiser that was built without memory: linear layers and convolutions read their weights when used.

    Args:
        denoiser: The denoiser, with parameters on the `meta` device and buffers with values.
        readers: A reader for each parameter, by name.
        device: The device of the denoiser.
        dtype: The element type of its parameters.
        float32: Names of modules whose parameters are float32 in any case, such as `norm1`.

    Raises:
        InputError: A parameter has no reader, or another shape than what is read. The shape of a weight that stays
            where it is stored is compared whenever it is read.
    """
    for name, module in denoiser.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            full = f"{name}.{key}" if name else key
            if full not in readers:
                raise InputError(f"The model's files hold no tensor '{full}', which its denoiser needs.")
            element = dtype if set(float32).isdisjoint(full.split(".")) else torch.float32
            if key == "weight" and isinstance(module, nn.Linear | nn.Conv2d):
                _store(module, full, readers[full], device, element)
                continue
            values = _of_shape(readers[full](device, element), parameter.shape, full)
            setattr(module, key, nn.Parameter(values, requires_grad=False))
    for name, module in denoiser.named_modules():
        for key, buffer in list(module.named_buffers(recurse=False)):
            reader = readers.get(f"{name}.{key}" if name else key)
            setattr(module, key, buffer.to(device) if reader is None else reader(device, buffer.dtype))
    denoiser.eval().requires_grad_(False)


def bring_stored(denoiser: nn.Module) -> None:
    """Brings every weight that is stored into memory, for good: the denoiser is an ordinary one then."""
    for module in denoiser.modules():
        if is_stored(module):
            values = _weight(module)
            for fact in (_READER, _PLACE, _NAME, _SHAPE):
                del vars(module)[fact]
            cls: Any = type(module)
            module.__class__ = cls.__mro__[1]
            module.register_parameter("weight", nn.Parameter(values, requires_grad=False))


def is_stored(module: nn.Module) -> bool:
    """Returns whether the weight of a layer is read from disk when it is used."""
    return _READER in vars(module)


def num_weights(layer: nn.Module) -> int:
    """Returns the number of elements of a layer's weight, without reading it."""
    return vars(layer)[_SHAPE].numel() if is_stored(layer) else layer.get_parameter("weight").numel()


def total_parameters(denoiser: nn.Module) -> int:
    """Returns the number of a denoiser's parameters, those that are stored among them."""
    stored = sum(num_weights(module) for module in denoiser.modules() if is_stored(module))
    return stored + sum(parameter.numel() for parameter in denoiser.parameters())


def _store(layer: nn.Module, name: str, reader: Reader, device: torch.device, dtype: torch.dtype) -> None:
    shape = layer.get_parameter("weight").shape
    del layer._parameters["weight"]
    cls: Any = type(layer)
    layer.__class__ = _stored_class(cls)
    vars(layer).update({_READER: reader, _PLACE: (device, dtype), _NAME: name, _SHAPE: shape})


@cache
def _stored_class(cls: Any) -> Any:
    """Returns a layer class whose weight is read from disk; it has the plain class's name, which identifies layers."""
    return type(cls.__name__, (cls,), {"weight": property(_weight), "__module__": cls.__module__})


def _weight(layer: nn.Module) -> Tensor:
    facts = vars(layer)
    return _of_shape(facts[_READER](*facts[_PLACE]), facts[_SHAPE], facts[_NAME])


def _of_shape(values: Tensor, shape: torch.Size, name: str) -> Tensor:
    if values.shape != shape:
        raise InputError(f"'{name}' has shape {list(values.shape)}, expected {list(shape)}.")
    return values


def _read(file: Path, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    with safe_open(file, framework="pt", device="cpu") as opened:
        mapped: Tensor = opened.get_tensor(name)
    values = mapped.to(device).to(dtype)
    return values.clone() if values is mapped else values
