"""Tensors on disk: safetensors only, one fixed order of names, no metadata: equal tensors are equal files."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from edadm_cli.artifacts.files import atomic_path, explained_os_errors
from edadm_cli.errors import InputError

if TYPE_CHECKING:
    import torch

_MAX_HEADER_BYTES = 100_000_000
_OS_ERROR_NUMBER = re.compile(r"\(os error (\d+)\)")


class TensorInfo(BaseModel):
    """A tensor's element type, by its name in safetensors (`F32`, `I8`, ...), and its shape."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: str
    shape: tuple[int, ...]


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file, whole or not at all: contiguous, on the CPU, names sorted, no metadata.

    Raises:
        MachineError: The disk is full or permission is denied.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    ready = {}
    storages: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        storage = tensor.untyped_storage().data_ptr()
        ready[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    with atomic_path(path) as temporary:
        try:
            save_file(ready, temporary)
        except SafetensorError as error:
            raise _os_error_within(error, path) from error


def load_tensors(
    path: Path, keys: Iterable[str] | None = None, device: str | torch.device = "cpu"
) -> dict[str, torch.Tensor]:
    """Read tensors from a safetensors file.

    Args:
        path: The file.
        keys: Names to read; `None` reads all.
        device: Where the tensors go.

    Raises:
        InputError: The file is missing, truncated or no safetensors file, or a name is not in it.
    """
    from safetensors import SafetensorError, safe_open

    with explained_os_errors(path):
        header = read_tensor_header(path)
        wanted = sorted(header) if keys is None else list(keys)
        for name in wanted:
            if name not in header:
                raise InputError(f"{path} holds no tensor '{name}'; it holds {', '.join(sorted(header)) or 'none'}.")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                return {name: file.get_tensor(name) for name in wanted}
        except SafetensorError as error:
            raise InputError(f"{path} is not a readable safetensors file: {error}.") from error


def read_tensor_header(path: Path) -> dict[str, TensorInfo]:
    """Read the names, element types and shapes of a safetensors file without its tensors.

    Raises:
        InputError: The file is missing, truncated or no safetensors file.
    """
    with explained_os_errors(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise InputError(f"{path} is truncated or not a safetensors file.")
        try:
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            _check_extent(path, entries, size - 8 - length)
            return {
                name: TensorInfo(dtype=entry["dtype"], shape=tuple(entry["shape"]))
                for name, entry in sorted(entries.items())
            }
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path} is not a safetensors file: its header does not parse.") from error


def _check_extent(path: Path, entries: Mapping[str, Any], available: int) -> None:
    extent = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    if extent != available:
        raise InputError(
            f"{path} is truncated or has foreign bytes: its tensors take {extent} bytes, the file has {available}."
        )


def _os_error_within(error: Exception, path: Path) -> Exception:
    """Find the operating-system error that safetensors reports as text."""
    match = _OS_ERROR_NUMBER.search(str(error))
    number = int(match[1]) if match else errno.ENOSPC if "No space left" in str(error) else None
    return error if number is None else OSError(number, os.strerror(number), str(path))
