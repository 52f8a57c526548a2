"""Writes safetensors files that are larger than memory piece by piece, and reads them slice by slice."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

from edadm_cli.artifacts.files import atomic_path, explained_os_errors, open_regular, save_json
from edadm_cli.artifacts.tensors import BITS, TensorInfo, places_within, read_tensor_header
from edadm_cli.errors import InputError

if TYPE_CHECKING:
    import torch

_NAMES = {
    "float64": "F64",
    "int64": "I64",
    "float32": "F32",
    "int32": "I32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_TORCH_NAMES = {name: torch_name for torch_name, name in _NAMES.items()}
_ALIGNMENT = 8


@dataclass(frozen=True)
class Streamed:
    """A tensor that is written piece by piece.

    Args:
        info: Its element type and shape.
        pieces: Returns contiguous pieces in the order of its elements.
    """

    info: TensorInfo
    pieces: Callable[[], Iterable[torch.Tensor]]

    @property
    def bytes(self) -> int:
        """Bytes on disk."""
        return BITS[self.info.dtype] // 8 * math.prod(self.info.shape)


def stream_tensors(path: Path, tensors: Mapping[str, Streamed]) -> None:
    """Writes a safetensors file, whole or not at all, with one piece in memory at a time.

    Raises:
        MachineError: The disk is full or permission is denied.
        ValueError: Pieces do not add up to the shape.
    """
    import torch

    ordered = sorted(tensors.items(), key=lambda item: (-BITS[item[1].info.dtype], item[0]))
    header, offset = {}, 0
    for name, tensor in ordered:
        info = tensor.info
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [offset, offset + tensor.bytes]}
        offset += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in ordered:
            written = 0
            for piece in tensor.pieces():
                written += file.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            if written != tensor.bytes:
                raise ValueError(f"'{name}' takes {tensor.bytes} bytes, and its pieces have {written}")


def stream_shards(folder: Path, stem: str, tensors: Mapping[str, Streamed], shard_bytes: int) -> None:
    """Writes tensors as one safetensors file; or, where that would be too large, as several with diffusers' index.

    Args:
        folder: Where the files are written to.
        stem: Start of their names: `stem.safetensors`, or `stem-00001-of-00002.safetensors` and so on.
        tensors: The tensors; shards take them in the order of their names.
        shard_bytes: Bytes of tensors above which another file begins. A larger tensor has a file of its own.

    Raises:
        MachineError: The disk is full or permission is denied.
    """
    shards: list[dict[str, Streamed]] = [{}]
    for name, tensor in sorted(tensors.items()):
        size = sum(other.bytes for other in shards[-1].values())
        if shards[-1] and size + tensor.bytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        stream_tensors(folder / f"{stem}.safetensors", shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        stream_tensors(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.bytes for tensor in tensors.values())
    save_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def streamed(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> Streamed:
    """Returns a tensor in one piece, which is copied to the CPU only when it is written.

    Args:
        tensor: The tensor, on any device.
        dtype: The element type that is written; by default the tensor's own.
    """
    name = str(dtype or tensor.dtype).removeprefix("torch.")
    info = TensorInfo(dtype=_NAMES[name], shape=tuple(tensor.shape))
    return Streamed(info, lambda: [tensor.detach().to("cpu", dtype or tensor.dtype)])


class TensorFile(Mapping[str, "torch.Tensor"]):
    """The tensors of a safetensors file by name. Each is read to the CPU whenever it is requested.

    The header is read and checked once, so that reading all tensors takes time in proportion to their bytes. Because
    the header says where the tensors lie, a file that was changed or replaced since then is refused.

    Raises:
        InputError: The file is missing, truncated or not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with explained_os_errors(path), open_regular(path) as file:
            self._places, self._version = places_within(file, path), _version(file)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Reads one tensor.

        Raises:
            InputError: The file is no longer the one whose header was read, or the tensor has a type that this package
                does not write.
        """
        import torch

        info, offset, size = self._places[name]
        if info.dtype not in _TORCH_NAMES:
            raise InputError(
                f"{self._path} has the tensor '{name}' of the type {info.dtype}, which is not expected here."
            )
        values = bytearray(size)
        with explained_os_errors(self._path), open_regular(self._path) as file:
            is_the_same = _version(file) == self._version
            file.seek(offset)
            if not is_the_same or file.readinto(values) != size:
                raise InputError(
                    f"{self._path} was changed or replaced while its tensors were being read.",
                    hint="type the same command again",
                )
        if not size:
            return torch.empty(info.shape, dtype=torch_type(info.dtype))
        return torch.frombuffer(values, dtype=torch_type(info.dtype)).reshape(info.shape)

    def __contains__(self, name: object) -> bool:
        """Returns whether there is a tensor of that name, without reading it."""
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        """Gives the names."""
        return iter(self._places)

    def __len__(self) -> int:
        """Returns the number of tensors."""
        return len(self._places)


def _version(file: BufferedReader) -> tuple[int, int]:
    """Returns the size and the time of the last change; on some network disks the number of a file is not stable."""
    facts = os.fstat(file.fileno())
    return facts.st_size, facts.st_mtime_ns


def torch_type(name: str) -> torch.dtype:
    """Returns the element type that safetensors calls `name`."""
    import torch

    dtype: torch.dtype = getattr(torch, _TORCH_NAMES[name])
    return dtype


def joined(paths: Sequence[Path], name: str, dim: int, shape: Sequence[int] | None = None) -> Streamed:
    """Returns the concatenation of a tensor of several files along dimension 0 or 1, read when it is written.

    Args:
        paths: The files.
        name: The tensor's name in each of them.
        dim: The dimension.
        shape: The shape of the dimensions after `dim`; a tensor that is smaller is padded with zeros. `None`: all have
            the shape of the first.
    """
    infos = [read_tensor_header(path)[name] for path in paths]
    row = tuple(infos[0].shape[dim + 1 :] if shape is None else shape)
    rows = sum(info.shape[dim] for info in infos)

    def pieces() -> Iterator[torch.Tensor]:
        if dim == 0:
            for path in paths:
                yield from (padded(piece, row) for piece in slices(path, name, 0, 1))
            return
        for index in range(infos[0].shape[0]):
            for path in paths:
                yield padded(read_slice(path, name, (slice(index, index + 1),)), row)

    return Streamed(TensorInfo(dtype=infos[0].dtype, shape=(*infos[0].shape[:dim], rows, *row)), pieces)


def padded(tensor: torch.Tensor, row: Sequence[int]) -> torch.Tensor:
    """Returns the tensor with its last dimensions extended by zeros to those of `row`."""
    import torch

    missing = [size - present for size, present in zip(row, tensor.shape[-len(row) :], strict=True)] if row else []
    if not any(missing):
        return tensor
    return torch.nn.functional.pad(tensor, [side for size in reversed(missing) for side in (0, size)])


def slices(path: Path, name: str, dim: int, size: int) -> Iterator[torch.Tensor]:
    """Yields the slices of a tensor along a dimension, `size` wide but for the last, one in memory at a time."""
    length = read_tensor_header(path)[name].shape[dim]
    for start in range(0, length, size):
        yield read_slice(path, name, (*[slice(None)] * dim, slice(start, min(start + size, length))))


def read_slice(path: Path, name: str, index: tuple[slice, ...]) -> torch.Tensor:
    """Returns one slice of a tensor, without reading the rest.

    Raises:
        InputError: The file is not a safetensors file or has no such tensor.
    """
    from safetensors import SafetensorError, safe_open

    with explained_os_errors(path):
        try:
            with safe_open(path, framework="pt") as file:
                tensor: torch.Tensor = file.get_slice(name)[index]
                return tensor
        except (SafetensorError, KeyError, TypeError, ValueError, IndexError) as error:
            raise InputError(f"{path} is not a readable safetensors file: {error}.") from error
