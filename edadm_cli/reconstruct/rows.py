"""Stores tensors with a row for each sample and guidance branch, in memory within a budget and on disk beyond it.

Units write and read their inputs and targets by rows. The values are the same whether a tensor is in the device's
memory or in a file. Files are plain bytes that are read without memory mapping, so that they do not count as memory of
this process.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from edadm_cli.artifacts import explained_os_errors

CACHE_FOLDER = "cache"


@dataclass(frozen=True)
class RowType:
    """Shape and element type of one row.

    A row may be several consecutive entries of a tensor's first dimension: the frames of a clip, or the tokens of a
    prompt if a network concatenates the tokens of all prompts. `shape` begins with `entries` then.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    entries: int = 1

    def joined(self, rows: Tensor) -> Tensor:
        """Returns rows `[n, *shape]` as the tensor of a call, `[n * entries, ...]`; unchanged if a row is one entry."""
        return rows if self.entries == 1 else rows.flatten(0, 1)

    @property
    def bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape) * self.dtype.itemsize


class Rows(ABC):
    """A tensor `[rows, *shape]` that is written and read by rows.

    Args:
        count: Number of rows.
        kind: Shape and element type of a row.
    """

    def __init__(self, count: int, kind: RowType) -> None:
        self.count, self.kind = count, kind

    @property
    def bytes(self) -> int:
        """Bytes of all rows."""
        return self.count * self.kind.bytes

    @property
    @abstractmethod
    def in_memory(self) -> bool:
        """Whether the rows are in the device's memory."""

    @abstractmethod
    def write(self, places: Sequence[int], values: Tensor) -> None:
        """Sets some rows to `values`, with shape `[len(places), *shape]` or that of `RowType.joined`."""

    @abstractmethod
    def read(self, places: Sequence[int], out: Tensor | None = None) -> Tensor:
        """Returns some rows, in any order, with shape `[len(places), *shape]`.

        Rows in memory are returned on the device. Rows of a file are returned on the CPU, in `out` if it is given.
        """

    @abstractmethod
    def close(self) -> None:
        """Releases the memory or removes the file."""


class MemoryRows(Rows):
    """Rows in the memory of the device."""

    def __init__(self, count: int, kind: RowType, device: torch.device) -> None:
        super().__init__(count, kind)
        self.tensor = torch.empty((count, *kind.shape), dtype=kind.dtype, device=device)

    @property
    def in_memory(self) -> bool:
        """Always."""
        return True

    def write(self, places: Sequence[int], values: Tensor) -> None:
        """Copies on the device."""
        self.tensor[self._index(places)] = values.to(self.kind.dtype).reshape(len(places), *self.kind.shape)

    def read(self, places: Sequence[int], out: Tensor | None = None) -> Tensor:
        """Copies on the device."""
        return torch.index_select(self.tensor, 0, self._index(places))

    def close(self) -> None:
        """Drops the tensor."""
        self.tensor = self.tensor.new_empty(0)

    def _index(self, places: Sequence[int]) -> Tensor:
        return torch.tensor(list(places), dtype=torch.int64, device=self.tensor.device)


class FileRows(Rows):
    """Rows in a file.

    Args:
        count: Number of rows.
        kind: Shape and element type of a row.
        path: The file; it gets its full size at once, so that a full disk is noticed before any work is done.
    """

    def __init__(self, count: int, kind: RowType, path: Path) -> None:
        super().__init__(count, kind)
        self.path = path
        with explained_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            os.posix_fallocate(self._descriptor, 0, max(1, self.bytes))

    @property
    def in_memory(self) -> bool:
        """Never."""
        return False

    def write(self, places: Sequence[int], values: Tensor) -> None:
        """Writes to the file."""
        ready = _bytes_of(values.detach().to("cpu", self.kind.dtype).contiguous())
        with explained_os_errors(self.path):
            for row, offset in self._spans(places, ready):
                while row:
                    written = os.pwrite(self._descriptor, row, offset)
                    row, offset = row[written:], offset + written

    def read(self, places: Sequence[int], out: Tensor | None = None) -> Tensor:
        """Reads from the file."""
        shape = (len(places), *self.kind.shape)
        result = torch.empty(shape, dtype=self.kind.dtype) if out is None else out
        ready = _bytes_of(result)
        with explained_os_errors(self.path):
            for row, offset in self._spans(places, ready):
                while row:
                    count = os.preadv(self._descriptor, [row], offset)
                    if count == 0:
                        raise OSError(5, "the file ends before its last row", str(self.path))
                    row, offset = row[count:], offset + count
        return result

    def _spans(self, places: Sequence[int], rows: memoryview) -> Iterator[tuple[memoryview, int]]:
        """Yields the bytes of each row, and their offset in the file."""
        size = self.kind.bytes
        for number, place in enumerate(places):
            yield rows[number * size : (number + 1) * size], place * size

    def close(self) -> None:
        """Closes and removes the file; other processes that have it open can still read it."""
        os.close(self._descriptor)
        self.path.unlink(missing_ok=True)


class RowCache:
    """Allocates rows: in memory within a budget, in files beyond it.

    Args:
        folder: The folder of the files.
        budget: Bytes of memory for all rows that are not released.
        device: The device of the memory.
        shared: Whether other processes write and read the same rows. All rows are then in files, and each process
            copies the rows that it works on into its own memory with `settle`.
    """

    def __init__(self, folder: Path, budget: int, device: torch.device, shared: bool = False) -> None:
        self.folder, self.budget, self.device, self.shared = folder / CACHE_FOLDER, budget, device, shared
        self.used = 0
        self._names = itertools.count()

    def clear(self) -> None:
        """Removes the files that a killed process left."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def allocate(self, count: int, kind: RowType, reserve: int = 0) -> Rows:
        """Returns uninitialized rows, in memory if they and `reserve` more bytes fit into it, else in a file.

        Raises:
            MachineError: The disk is full.
        """
        rows = None if self.shared else self._in_memory(count, kind, reserve)
        return rows or FileRows(count, kind, self.folder / f"{next(self._names):06d}.rows")

    def fits(self, size: int) -> bool:
        """Returns whether `size` more bytes stay within the budget."""
        return self.used + size <= self.budget

    def _in_memory(self, count: int, kind: RowType, reserve: int = 0) -> MemoryRows | None:
        """Returns rows in memory; `None` if the budget or the device's memory does not suffice."""
        if not self.fits(count * kind.bytes + reserve):
            return None
        try:
            rows = MemoryRows(count, kind, self.device)
        except torch.OutOfMemoryError:  # other programs, or gaps between blocks, take what the budget counts on
            return None
        self.used += rows.bytes
        return rows

    def settle(self, rows: Rows, chunk: int) -> Rows:
        """Returns rows that all processes wrote, copied into memory if the budget allows, `chunk` rows at a time."""
        settled = None if rows.in_memory else self._in_memory(rows.count, rows.kind)
        if settled is None:
            return rows
        for places in chunks(rows.count, chunk):
            settled.write(places, rows.read(places).to(self.device))
        rows.close()
        return settled

    def release(self, group: Iterable[Rows]) -> None:
        """Releases rows."""
        for rows in group:
            self.used -= rows.bytes if rows.in_memory else 0
            rows.close()


def chunks(count: int, size: int) -> list[range]:
    """Returns the numbers from 0 to `count` in ranges of at most `size`."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
