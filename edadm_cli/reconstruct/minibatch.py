"""Copies the rows of one optimizer step to the device of the unit."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from edadm_cli.reconstruct.rows import MemoryRows, Rows

_SETS = 2  # while one set of staging buffers is copied to the device, the other is filled from the disk


class MiniBatch:
    """Copies of some rows of several tensors, in buffers that keep their address, as CUDA graphs need it.

    A thread reads rows from files ahead, on CUDA into pinned memory, while the previous step computes. `calls` are
    views of the buffers `tensors` in the shapes of a call.

    Args:
        sources: The tensors.
        size: Rows per step.
        device: The device of the buffers.
    """

    def __init__(self, sources: Sequence[Rows], size: int, device: torch.device) -> None:
        self._sources, self._device = list(sources), device
        self.tensors = [torch.empty((size, *rows.kind.shape), dtype=rows.kind.dtype, device=device) for rows in sources]
        self.calls = [rows.kind.joined(tensor) for rows, tensor in zip(sources, self.tensors, strict=True)]
        self._filed = [number for number, rows in enumerate(sources) if not rows.in_memory]
        pinned = device.type == "cuda"
        self._staging = [
            {number: torch.empty_like(self.tensors[number], device="cpu", pin_memory=pinned) for number in self._filed}
            for _ in range(_SETS if self._filed else 0)
        ]
        self._copied = [torch.cuda.Event() for _ in self._staging] if pinned else []
        self._turn = 0
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="rows") if self._filed else None
        self._ahead: tuple[list[int], Future[dict[int, Tensor]]] | None = None

    def load(self, places: list[int], upcoming: list[int] | None = None) -> None:
        """Copies the rows of a step into the buffers.

        Args:
            places: The numbers of the rows of this step.
            upcoming: The numbers of the rows of the next step, which the thread reads ahead.
        """
        index = torch.tensor(places, dtype=torch.int64).to(self._device, non_blocking=True)
        for rows, tensor in zip(self._sources, self.tensors, strict=True):
            if isinstance(rows, MemoryRows):
                torch.index_select(rows.tensor, 0, index, out=tensor)
        if self._reader is None:
            return
        if self._ahead is None or self._ahead[0] != places:
            self._ahead = (places, self._submit(places))
        for number, staged in self._ahead[1].result().items():
            self.tensors[number].copy_(staged, non_blocking=True)
        if self._copied:
            self._copied[self._turn - 1].record()
        self._ahead = None if upcoming is None else (upcoming, self._submit(upcoming))

    def close(self) -> None:
        """Ends the thread that reads ahead."""
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)

    def _submit(self, places: list[int]) -> Future[dict[int, Tensor]]:
        assert self._reader is not None
        turn, self._turn = self._turn, (self._turn + 1) % _SETS
        return self._reader.submit(self._read, places, turn)

    def _read(self, places: list[int], turn: int) -> dict[int, Tensor]:
        if self._copied:
            self._copied[turn].synchronize()
        buffers = self._staging[turn]
        for number in self._filed:
            self._sources[number].read(places, buffers[number])
        return buffers
