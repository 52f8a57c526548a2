"""Reads and writes safetensors files with sorted names and no metadata: equal tensors give equal files."""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edadm_cli.artifacts.files import atomic_path, explained_os_errors, open_regular
from edadm_cli.artifacts.json_text import parse_json
from edadm_cli.errors import InputError, explain_field

if TYPE_CHECKING:
    import torch

_MAX_HEADER_BYTES = 100_000_000
_REMEMBERED_BYTES = 2**21
"""Size of the largest header that is remembered once it is checked."""
_LARGEST_SIZE = 2**63 - 1
BITS = (
    dict.fromkeys(("F64", "I64", "U64", "C64"), 64)
    | dict.fromkeys(("F32", "I32", "U32"), 32)
    | dict.fromkeys(("F16", "BF16", "I16", "U16"), 16)
    | dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
    | {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
)
"""Bits of an element, by the name of its type in safetensors."""
_OS_ERROR_NUMBER = re.compile(r"\(os error (\d+)\)")


class TensorInfo(BaseModel):
    """A tensor's element type, by its name in safetensors (`F32`, `I8`, ...), and its shape."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: str
    shape: tuple[int, ...]


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a safetensors file, whole or not at all: contiguous, on the CPU, names sorted, no metadata.

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


def load_tensors(path: Path, keys: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Reads tensors from a safetensors file, to the CPU.

    Args:
        path: The file.
        keys: Names to read; `None` reads all.

    Raises:
        InputError: The file is missing, truncated or not a safetensors file, or a name is not in it.
    """
    from safetensors import SafetensorError, safe_open

    with explained_os_errors(path):
        header = read_tensor_header(path)
        names = sorted(header) if keys is None else list(keys)
        for name in names:
            if name not in header:
                raise InputError(f"{path} holds no tensor '{name}'; it holds {', '.join(sorted(header)) or 'none'}.")
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in names}
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path} is not a readable safetensors file: {error}.") from error


def load_pickled_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads named tensors from a file that `torch.save` wrote. Nothing in the file is run.

    Raises:
        InputError: The file cannot be read so, or it holds something else than named tensors.
    """
    import torch

    refusal = InputError(f"{path} is not a readable file of weights that holds tensors only.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises errors of any kind for bytes that it cannot read
        raise refusal from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise refusal
    return state


def read_tensor_header(path: Path) -> dict[str, TensorInfo]:
    """Reads the names, element types and shapes of a safetensors file without its tensors.

    Raises:
        InputError: The file is missing, truncated or not a regular file, or its header is not valid: tensors must have
            a known type, follow each other without gaps, and have the size of their shape.
    """
    return {name: place.info for name, place in read_tensor_places(path).items()}


class TensorPlace(NamedTuple):
    """Describes where a tensor lies in a safetensors file: its type, shape, first byte and number of bytes."""

    info: TensorInfo
    offset: int
    size: int


def read_tensor_places(path: Path) -> dict[str, TensorPlace]:
    """Reads where the tensors of a safetensors file lie, by name.

    Raises:
        InputError: As from `read_tensor_header`.
    """
    with explained_os_errors(path), open_regular(path) as file:
        return places_within(file, path)


def places_within(file: BufferedReader, path: Path) -> dict[str, TensorPlace]:
    """Reads where the tensors of an opened safetensors file lie, by name; `path` is its path, for messages.

    Raises:
        InputError: The file is truncated, or its header is not valid.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        raise InputError(f"{path} is truncated or not a safetensors file.")
    content = file.read(length)
    parse = _parse if length <= _REMEMBERED_BYTES else _parse.__wrapped__
    return dict(parse(content, path, size - 8 - length))


@lru_cache(maxsize=16)
def _parse(content: bytes, path: Path, available: int) -> dict[str, TensorPlace]:
    """Returns where the tensors lie. Results are remembered: a file is checked whenever its artifact is opened.

    Args:
        content: The header.
        path: The file, for messages.
        available: Bytes of the file after the header.
    """
    try:
        header = parse_json(content.decode("utf-8"), "the header")
        if not isinstance(header, dict):
            raise ValueError("the header is no table")
        _check_metadata(header.pop("__metadata__", {}))
        entries = {name: _Entry.model_validate(entry, strict=True) for name, entry in sorted(header.items())}
    except ValidationError as error:
        raise InputError(f"{path} is not a safetensors file: {_problem(error)}.") from error
    except InputError as error:
        raise InputError(f"{path} is not a safetensors file: {error.message.rstrip('.')}.") from error
    except ValueError as error:
        raise InputError(f"{path} is not a safetensors file: {error}.") from error
    _check_extents(path, entries, available)
    return {name: entry.place(8 + len(content)) for name, entry in entries.items()}


class _Entry(BaseModel):
    """A tensor as the header of a safetensors file describes it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: str
    shape: list[Annotated[int, Field(ge=0, le=_LARGEST_SIZE)]]
    data_offsets: Annotated[list[Annotated[int, Field(ge=0, le=_LARGEST_SIZE)]], Field(min_length=2, max_length=2)]

    def place(self, start: int) -> TensorPlace:
        """Returns where the tensor lies in a file whose tensors begin at the byte `start`."""
        begin, end = self.data_offsets
        return TensorPlace(TensorInfo(dtype=self.dtype, shape=tuple(self.shape)), start + begin, end - begin)


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not a table of texts")


def _problem(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"'{'.'.join(str(part) for part in first['loc'])}' of a tensor: {explain_field(first)}"


def _check_extents(path: Path, entries: Mapping[str, _Entry], available: int) -> None:
    """Raises an `InputError` unless the tensors fill the file, one after the other without gaps."""
    reached = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        if entry.dtype not in BITS:
            raise InputError(f"{path} has the tensor '{name}' of the unknown type {entry.dtype[:40]!r}.")
        if begin != reached or end - begin != (math.prod(entry.shape) * BITS[entry.dtype] + 7) // 8:
            raise InputError(f"{path} is damaged: the tensor '{name}' has not the place that its shape and type need.")
        reached = end
    if reached != available:
        raise InputError(
            f"{path} is truncated or has foreign bytes: its tensors take {reached} bytes, the file has {available}."
        )


def _os_error_within(error: Exception, path: Path) -> Exception:
    """Returns the operating-system error that safetensors reports as text."""
    match = _OS_ERROR_NUMBER.search(str(error))
    number = int(match[1]) if match else errno.ENOSPC if "No space left" in str(error) else None
    return error if number is None else OSError(number, os.strerror(number), str(path))
