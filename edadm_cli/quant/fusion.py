"""Compiles elementwise arithmetic to one kernel on a GPU.

Otherwise each operation reads and writes all elements, which takes longer than the arithmetic. torch.compile makes
one kernel of all operations with the same results, bit for bit except for the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., object])


def fused(function: _Function, x: Tensor) -> _Function:
    """Returns `function`, compiled if `x` is on a GPU that this torch can compile for.

    Args:
        function: A function of a module that takes flat tensors, whose lengths may differ between calls. It is compiled
            once. It works element by element: a sum over a length that is not known when it is compiled runs on a
            single multiprocessor.
        x: One of its arguments.
    """
    result: _Function = _compiled(function) if x.is_cuda and _can_compile() else function
    return result


def flat(x: Tensor) -> Tensor:
    """Returns the elements in one dimension, detached, as arguments of a fused function.

    A detached tensor is not a view. torch.compile guards the shape behind a view, and would compile again for each
    shape until it refuses.
    """
    return x.reshape(-1).detach()


@cache
def _compiled(function: Callable[..., Any]) -> Any:
    # Not fullgraph: after too many compiled forms, torch runs operation by operation instead of failing.
    return torch.compile(function, dynamic=True)


@cache
def _can_compile() -> bool:
    return find_spec("triton") is not None
