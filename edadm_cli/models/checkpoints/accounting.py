"""Accounts for every tensor of a CompVis checkpoint.

A tensor either goes into a module, or is reported as missing, misshapen, left over or not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.errors import InputError
from edadm_cli.models.architecture import Architecture
from edadm_cli.models.checkpoints.names import autoencoder_name, ema_name, level_of, unet_name

DENOISER, FIRST_STAGE, LABELS, EMA = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "model_ema."
# Parts of a checkpoint that only training uses.
_TRAINING = (f"{FIRST_STAGE}loss.", f"{FIRST_STAGE}model_ema.", f"{EMA}decay", f"{EMA}num_updates")
_SHOWN = 5


def empty_module(architecture: Architecture, name: str) -> nn.Module:
    """Returns a component of a pipeline whose weights are on the `meta` device and take no memory.

    Raises:
        InputError: Its class cannot be built from its configuration.
    """
    from accelerate import init_empty_weights

    cls, config = architecture.component_class(name), architecture.config(name)
    try:
        with torch.device("meta"):  # first without touching memory, however large the model claims to be
            module: nn.Module = cls(**config)
        if any(buffer.is_meta for buffer in module.buffers()):
            with init_empty_weights(include_buffers=False):
                module = cls(**config)
    except (ValueError, TypeError, ArithmeticError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise InputError(f"No {cls.__name__} can be built from the configuration of the '{name}': {reason}.") from error
    return module


@dataclass(frozen=True)
class _Part:
    """Names one third of a tensor that holds query, key and value.

    Attributes:
        index: 0 for the query, 1 for the key, 2 for the value.
        num_heads: The number of attention heads.
    """

    index: int
    num_heads: int


@dataclass(frozen=True)
class _Place:
    """Says where a checkpoint holds a parameter.

    Attributes:
        key: The name of the tensor.
        part: The part of the tensor; `None` for all of it.
    """

    key: str
    part: _Part | None = None


def denoiser_places(denoiser: nn.Module) -> Callable[[str], _Place]:
    """Returns a function that maps the name of a denoiser's parameter to its place in a checkpoint."""
    config: Any = denoiser.config

    def place(name: str) -> _Place:
        if name.startswith("label_embedding."):
            return _Place(f"{LABELS}embedding.{name.rpartition('.')[2]}")
        level = level_of(name)
        has_attention = level is not None and hasattr(denoiser.get_submodule(level), "attentions")
        key = DENOISER + unet_name(name, config.layers_per_block, has_attention)
        if ".qkv." not in key:
            return _Place(key)
        attention: Any = denoiser.get_submodule(name.rsplit(".", 2)[0])
        return _Place(key, _Part("qkv".index(name.rsplit(".", 2)[1][-1]), attention.heads))

    return place


def autoencoder_places(autoencoder: nn.Module) -> Callable[[str], _Place]:
    """Returns a function that maps the name of an autoencoder's parameter to its place in a checkpoint."""
    config: Any = autoencoder.config
    num_levels = len(config.block_out_channels)
    return lambda name: _Place(FIRST_STAGE + autoencoder_name(name, num_levels))


class TensorAccount:
    """Takes tensors from a checkpoint and records which are missing, misshapen, left over or not finite.

    Args:
        path: The path of the checkpoint, which messages name.
        state: The tensors of the checkpoint by name.
        averaged: Whether to take the moving averages of the denoiser's weights in place of the weights.
        heads_first: Whether the rows of a tensor that holds query, key and value are grouped by head first.
    """

    def __init__(self, path: Path, state: Mapping[str, Tensor], averaged: bool, heads_first: bool) -> None:
        self._path, self._state, self._averaged, self._heads_first = path, state, averaged, heads_first
        self._known: set[str] = set()
        self._missing: list[str] = []
        self._misshapen: list[str] = []
        self._not_finite: list[str] = []

    def collect(self, module: nn.Module, place_of: Callable[[str], _Place]) -> dict[str, Tensor]:
        """Returns the tensors of a module's parameters by parameter name, except missing and misshapen ones."""
        tensors = {}
        for name, parameter in module.named_parameters():
            tensor = self._take(place_of(name), parameter.shape)
            if tensor is not None:
                tensors[name] = tensor
        return tensors

    def require_all_fit(self) -> None:
        """Checks that the checkpoint and the collected modules have the same tensors, and that all values are finite.

        Raises:
            InputError: They differ, or a value is not finite. The message names the tensors.
        """
        extra = sorted(name for name in self._state if name not in self._known and not _is_training(name))
        if not self._averaged:
            extra = [name for name in extra if not name.startswith(EMA)]
        problems = (
            ("lacks", self._missing),
            ("has tensors of another shape than expected:", self._misshapen),
            ("has tensors that its model does not take:", extra),
            ("holds values that are not finite (NaN or infinity) in", self._not_finite),
        )
        for what, names in problems:
            if names:
                raise InputError(f"{self._path} {what} {listed(list(dict.fromkeys(names)))}.")

    def _take(self, place: _Place, shape: Sequence[int]) -> Tensor | None:
        """Returns the tensor of a parameter; `None` if it is missing or misshapen, which is recorded."""
        self._known.add(place.key)
        is_averaged = self._averaged and place.key.startswith(DENOISER)
        key = ema_name(place.key) if is_averaged else place.key
        self._known.add(key)
        tensor = self._state.get(key)
        if tensor is None:
            self._missing.append(key)
            return None
        expected = tuple(shape) if place.part is None else (3 * shape[0], *shape[1:])
        if tensor.ndim > len(expected) and all(size == 1 for size in tensor.shape[len(expected) :]):
            flat = tensor.reshape(tensor.shape[: len(expected)])  # a convolution of size one as a linear layer
        else:
            flat = tensor
        if tuple(flat.shape) != expected:
            self._misshapen.append(f"{key} {list(tensor.shape)} for {list(expected)}")
            return None
        if not is_finite(flat):
            self._not_finite.append(key)
        return flat if place.part is None else self._split(flat, place.part)

    def _split(self, tensor: Tensor, part: _Part) -> Tensor:
        """Returns the query, the key or the value part of a tensor that holds all three.

        Its rows are grouped by head and then by query, key and value, or the other way round; see `heads_first`.
        """
        if not self._heads_first:
            return tensor.chunk(3)[part.index]
        rows = tensor.shape[0] // 3
        return tensor.unflatten(0, (part.num_heads, 3, -1))[:, part.index].reshape(rows, *tensor.shape[1:])


def _is_training(name: str) -> bool:
    """Returns whether only training needs a tensor; constants of the noise schedule have no dot in their names."""
    return "." not in name or name.startswith(_TRAINING)


def is_finite(tensor: Tensor) -> bool:
    """Returns whether a tensor holds neither NaN nor infinity; float8 is cast first because torch cannot test it."""
    if not tensor.is_floating_point():
        return True
    return bool((tensor.float() if tensor.element_size() == 1 else tensor).isfinite().all())


def listed(names: list[str]) -> str:
    """Returns a text with the first names of a list in quotes, and the number of the others."""
    shown = ", ".join(f"'{name}'" for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
