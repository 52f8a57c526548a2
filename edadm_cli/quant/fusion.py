"""Elementwise arithmetic as one kernel on a GPU.

Operation by operation, every element is read and written again for each of them, and that takes longer than the
arithmetic. torch.compile makes one kernel of all; it is the same arithmetic, bit for bit but for the order of sums.
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
    """Returns `function`, compiled where `x` lies on a GPU and this torch can compile for it.

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

    Detached, they are no view: of a view, torch.compile guards the shape of what it is a view of, and it compiles again
    for each shape until it refuses.
    """
    return x.reshape(-1).detach()


@cache
def _compiled(function: Callable[..., Any]) -> Any:
    # Not fullgraph: where torch has compiled too many forms of it, it runs operation by operation instead of failing.
    return torch.compile(function, dynamic=True)


@cache
def _can_compile() -> bool:
    return find_spec("triton") is not None
