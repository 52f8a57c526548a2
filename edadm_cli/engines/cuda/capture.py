"""Runs a function of tensors as a CUDA graph, which is recorded once per set of shapes and then replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

WARM_UP = 3
"""The number of calls before recording, in which kernels are compiled and libraries choose their algorithms."""


class GraphedFunction:
    """Calls a function by replaying CUDA graphs.

    A graph is recorded at the first call with new shapes, element types or other arguments. Outputs are copies, so a
    later call does not overwrite them. All graphs share one memory pool, because they never run at the same time.

    Args:
        function: A function that takes nested tensors and constants and returns nested tensors. It launches work on one
            CUDA device and never waits for it.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._recorded: dict[Any, _Recording] = {}
        self._pool: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Replays the graph for these arguments, and records it first if there is none."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        key = (str(spec), tuple(_signature(leaf) for leaf in leaves))
        if key not in self._recorded:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            self._recorded[key] = _Recording(self.function, leaves, spec, self._pool)
        return self._recorded[key].replay(leaves)


class _Recording:
    """Holds one graph with its input and output buffers."""

    def __init__(self, function: Callable[..., Any], leaves: list[Any], spec: Any, pool: Any) -> None:
        self._inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(self._inputs, spec)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                function(*args, **kwargs)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            outputs = function(*args, **kwargs)
        self._outputs, self._output_spec = pytree.tree_flatten(outputs)

    def replay(self, leaves: list[Any]) -> Any:
        for buffer, leaf in zip(self._inputs, leaves, strict=True):
            if isinstance(leaf, Tensor):
                buffer.copy_(leaf)
        self._graph.replay()
        copies = [x.clone() if isinstance(x, Tensor) else x for x in self._outputs]
        return pytree.tree_unflatten(copies, self._output_spec)


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
    return leaf
