"""Runs a function of tensors as a CUDA graph, which is recorded once per set of shapes and then replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

WARM_UP = 3
"""The number of calls before recording, in which kernels are compiled and libraries choose their algorithms."""


class GraphMemory:
    """Holds what CUDA graphs share if they never run at the same time: a memory pool, and buffers of equal inputs."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._inputs: dict[Any, Tensor] = {}

    @property
    def pool(self) -> Any:
        """Returns the memory pool, which is created when it is first asked for."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool

    @property
    def stream(self) -> torch.cuda.Stream:
        """Returns the stream of the calls before recording; libraries keep a workspace for each stream."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        return self._stream

    def input(self, place: int, value: Tensor) -> Tensor:
        """Returns the buffer of all inputs at this place that have the shape and type of `value`, filled with it."""
        key = (place, _signature(value))
        if key in self._inputs:
            return self._inputs[key].copy_(value)
        self._inputs[key] = value.clone()
        return self._inputs[key]


class GraphedFunction:
    """Calls a function by replaying CUDA graphs.

    A graph is recorded at the first call with new shapes, element types or other arguments. Outputs are copies, so a
    later call does not overwrite them.

    Args:
        function: A function that takes nested tensors and constants and returns nested tensors. It launches work on one
            CUDA device and never waits for it.
        memory: The memory that is shared with functions whose graphs never run at the same time; by default none.
    """

    def __init__(self, function: Callable[..., Any], memory: GraphMemory | None = None) -> None:
        self.function = function
        self._recorded: dict[Any, Recording] = {}
        self._memory = memory or GraphMemory()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Replays the graph for these arguments, and records it first if there is none."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        key = signature(leaves, spec)
        if key not in self._recorded:
            self._recorded[key] = Recording(self.function, leaves, spec, self._memory)
        return self._recorded[key].replay(leaves)


def signature(leaves: list[Any], spec: Any) -> Any:
    """Returns what the calls of a graph have in common: structure, shapes, types, and values that are no tensors."""
    return str(spec), tuple(_signature(leaf) for leaf in leaves)


class Recording:
    """Holds one graph with its input and output buffers.

    Args:
        function: What is recorded; see `GraphedFunction`.
        leaves: The leaves of the arguments `(args, kwargs)`.
        spec: Their structure.
        memory: The memory of the graph.
        warm_up: The number of calls before recording.
    """

    def __init__(
        self, function: Callable[..., Any], leaves: list[Any], spec: Any, memory: GraphMemory, warm_up: int = WARM_UP
    ) -> None:
        self._inputs = [
            memory.input(place, leaf) if isinstance(leaf, Tensor) else leaf for place, leaf in enumerate(leaves)
        ]
        args, kwargs = pytree.tree_unflatten(self._inputs, spec)
        side = memory.stream
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warm_up):
                function(*args, **kwargs)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=memory.pool):
            outputs = function(*args, **kwargs)
        self._outputs, self._output_spec = pytree.tree_flatten(outputs)

    def replay(self, leaves: list[Any]) -> Any:
        """Runs the graph with the tensors of a call whose signature is that of the recorded one; returns copies."""
        for buffer, leaf in zip(self._inputs, leaves, strict=True):
            if isinstance(leaf, Tensor):
                buffer.copy_(leaf)
        self._graph.replay()
        copies = [x.clone() if isinstance(x, Tensor) else x for x in self._outputs]
        return pytree.tree_unflatten(copies, self._output_spec)


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
    return type(leaf), leaf  # 1, 1.0 and True are equal, and are not the same constant
