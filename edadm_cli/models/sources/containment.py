"""Keeps libraries from asking the user, using the network, or building oversized networks while they load a model."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, Protocol

from edadm_cli.errors import InputError

# A library registers a parameter once when it builds a module and once more when it fills it; packed codes take less
# space than what they stand for.
_TIMES = 8
_SMALL_COUNT, _SMALL_SIZE = 1000, 10_000_000


class _Shaped(Protocol):
    """A tensor, or its entry in the header of a file."""

    @property
    def shape(self) -> Sequence[int]:
        """Its sizes."""


@contextmanager
def no_questions() -> Iterator[None]:
    """Replaces standard input by an empty one while entered, so that no script answers a library's questions."""
    before, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    finally:
        sys.stdin = before


@contextmanager
def no_network() -> Iterator[None]:
    """Keeps the client of the Hugging Face hub offline: no configuration of a local model makes it fetch files."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def bounded_size(config: Path, tensors: Iterable[_Shaped]) -> Iterator[None]:
    """Stops the construction of a network that is far larger than its weights, such as one of 100,000 layers.

    Args:
        config: The configuration that it is built from, for messages.
        tensors: Its weights, or their entries in the headers of the files.

    Raises:
        InputError: Far more parameters are built than there are weights, in number or in size.
    """
    from torch.nn.modules.module import register_module_parameter_registration_hook

    shapes = [tuple(tensor.shape) for tensor in tensors]
    most = _TIMES * len(shapes) + _SMALL_COUNT
    largest = _TIMES * sum(prod(shape) for shape in shapes) + _SMALL_SIZE
    count = size = 0

    def note(module: Any, name: str, parameter: Any) -> None:
        nonlocal count, size
        if parameter is not None:
            count, size = count + 1, size + parameter.numel()
        if count > most or size > largest:
            raise InputError(
                f"{config} describes a network far larger than its weights, which have {len(shapes)} tensors with "
                f"{sum(prod(shape) for shape in shapes)} values."
            )

    handle = register_module_parameter_registration_hook(note)
    try:
        yield
    finally:
        handle.remove()
