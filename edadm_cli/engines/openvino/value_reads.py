"""Finds the inputs whose values a denoiser reads in Python while it is traced, because they become constants.

Lumina 2, for example, reads the number of text tokens from a mask and cuts its sequences accordingly. A graph that is
made from such a trace is right for the values of the example only. Sizes are no values: a trace keeps them as
operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

READING = {
    "tolist",
    "item",
    "numpy",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "equal",
    "allclose",
    "is_nonzero",
}
"""The functions whose results are Python values."""
_NUMBERS = {"tolist", "item", "numpy", "__int__", "__index__"}
"""Those of them whose results are numbers, not answers to a comparison."""
_SIZES = {"aten::size", "aten::numel", "aten::dim", "aten::len", "aten::stride", "prim::Constant", "prim::GetAttr"}
_SIZES |= {f"aten::{name}" for name in ("zeros_like", "ones_like", "empty_like", "new_zeros", "new_ones", "new_empty")}
"""The nodes of a trace whose results do not depend on the values of their inputs."""


class ValueReads:
    """Collects what is read.

    Attributes:
        names: The names of the inputs on which the values that are read depend.
        sizes: Whether a size became a Python number, such as the length of a table of positions.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.sizes = False
        self._inputs: dict[int, str] = {}

    def begin(self, inputs: Mapping[str, Tensor]) -> None:
        """Takes the inputs of a trace, by name."""
        self._inputs = {_traced(tensor).unique(): name for name, tensor in inputs.items()}

    def note(self, function: str, args: tuple[Any, ...]) -> None:
        """Adds the inputs on which the arguments of a function of `READING` depend in the present trace."""
        self.sizes = self.sizes or function in _NUMBERS
        waiting = [_traced(value) for value in args if isinstance(value, Tensor)]
        seen: set[int] = set()
        while waiting:
            value = waiting.pop()
            number = value.unique()  # names are given again while a trace goes on
            if number in seen:
                continue
            seen.add(number)
            if number in self._inputs:
                self.names.add(self._inputs[number])
            elif value.node().kind() not in _SIZES:
                waiting.extend(value.node().inputs())


def _traced(tensor: Tensor) -> Any:
    """Returns the value of the trace that a tensor is."""
    library: Any = torch._C
    return library._get_value_trace(tensor)
