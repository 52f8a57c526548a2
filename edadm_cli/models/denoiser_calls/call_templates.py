"""Templates of denoiser calls: plain JSON with the position of each tensor and the literal values of everything else.

`calls.split_call` makes a template of a call, and `build_call` makes a call of a template again, for any rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SAMPLE = "sample"
TIMESTEP = "timestep"
MARK = "$"
"""The first character of the key of a place."""
_NAMING_MARKS = (MARK + "tensor", MARK + "joined", MARK + "rows_second", MARK + "complex")
_TENSOR_MARKS = (MARK + SAMPLE, MARK + TIMESTEP, MARK + "tensor")
_PLACES = {*_NAMING_MARKS, *_TENSOR_MARKS, *(MARK + kind for kind in ("tuple", "rows", "each", "ragged"))}

Template = dict[str, Any]
"""`{"args": [...], "kwargs": {...}, "constants": [names], "dtypes": {name: dtype}}`.

A one-entry object whose key starts with `$` is a place, and all else is literal. The places are:

- `{"$sample": null}`, the sample, and `{"$timestep": null}`, the timestep; `{"$timestep": [4]}` is a timestep with four
  equal values per row.
- `{"$tensor": name}`, a tensor, and `{"$complex": name}`, one of complex numbers, whose real and imaginary parts are
  stored in a last dimension of 2.
- `{"$joined": name}`, a tensor with several entries per row in its first dimension, which is stored as
  `(R, entries, *)`; `{"$rows_second": name}`, one whose second dimension counts the rows, which is stored as
  `(R, first, *)`.
- `{"$tuple": [...]}`, a tuple; `{"$rows": place}`, a list of the rows of a tensor; `{"$each": item}`, a list with one
  equal item per row.
- `{"$ragged": name}`, a list of rows of different length: they are stored padded with zeros, and the tensor
  `name.lengths` holds the length of each.
"""


def build_call(
    template: Template, sample: Tensor, timestep: Tensor, tensors: Mapping[str, Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Builds a call from a template; the inverse of `calls.split_call`.

    Args:
        template: A template from `split_call`.
        sample: The sample, with shape `(R, *)`.
        timestep: A scalar, or one value per row with shape `(R,)`.
        tensors: Condition (with `R` rows) and constants by dotted name.

    Returns:
        `(args, kwargs)` for the denoiser.
    """
    fill = _Filler(sample, timestep, tensors)
    return tuple(fill(item) for item in template["args"]), {name: fill(v) for name, v in template["kwargs"].items()}


@dataclass(frozen=True, eq=False)
class _Filler:
    """Puts tensors into the places of a template; see `build_call`."""

    sample: Tensor
    timestep: Tensor
    tensors: Mapping[str, Tensor]

    def __call__(self, node: Any) -> Any:
        """Returns a node of a template with tensors in its places."""
        if isinstance(node, list):
            return [self(item) for item in node]
        if not isinstance(node, dict):
            return node
        if len(node) == 1:
            key, value = next(iter(node.items()))
            if key in _PLACES:
                return self._place(key.removeprefix(MARK), value)
        return {key: self(value) for key, value in node.items()}

    def _place(self, kind: str, value: Any) -> Any:
        """Returns what belongs into a place; `Template` lists the kinds of places and the value of each."""
        match kind:
            case "sample":
                return self.sample
            case "timestep":
                return self._timestep(value)
            case "tensor":
                return self.tensors[value]
            case "complex":
                return torch.view_as_complex(self.tensors[value].float().contiguous())
            case "joined":
                return self.tensors[value].flatten(0, 1)
            case "rows_second":
                return self.tensors[value].transpose(0, 1)
            case "tuple":
                return tuple(self(item) for item in value)
            case "rows":
                return list(self(value))
            case "each":
                return [self(value) for _ in range(self.sample.shape[0])]
            case _:
                return self._ragged(value)

    def _timestep(self, shape: list[int] | None) -> Tensor:
        if not shape:
            return self.timestep
        return self.timestep.reshape(-1, *[1] * len(shape)).expand(self.sample.shape[0], *shape)

    def _ragged(self, name: str) -> list[Tensor]:
        lengths = self.tensors[lengths_name(name)].tolist()
        return [row[:length] for row, length in zip(self.tensors[name], lengths, strict=True)]


def per_row(template: Template, rows: int) -> Template:
    """Returns a template in which a list that repeats one item for each row of the batch becomes the item, as `$each`.

    Pipelines pass sizes of images in this way. As literals, they would differ between batches of different size.

    Args:
        template: A template from `split_call`.
        rows: Rows of the sample.
    """

    def shortened(value: Any) -> Any:
        is_per_row = isinstance(value, list) and len(value) == rows and all(item == value[0] for item in value)
        is_plain = is_per_row and isinstance(value[0], list | dict) and not placed_tensors(value[0])
        return {MARK + "each": value[0]} if is_plain else value

    kwargs = {name: shortened(value) for name, value in template["kwargs"].items()}
    return {**template, "kwargs": kwargs}


def is_tensor(node: Any) -> bool:
    """Returns whether a node of a template stands for a tensor."""
    return isinstance(node, Mapping) and len(node) == 1 and next(iter(node)) in _TENSOR_MARKS


def placed_tensors(node: Any) -> set[str]:
    """Returns the names of the tensors in a template or a part of it, besides sample and timestep.

    Raises:
        ValueError: A tensor has no name, a timestep no shape, or a tuple no items.
    """
    if isinstance(node, list):
        return set().union(*(placed_tensors(item) for item in node))
    if not isinstance(node, dict):
        return set()
    if len(node) == 1:
        mark, value = next(iter(node.items()))
        if mark in _NAMING_MARKS or (mark == MARK + "ragged" and value is not None):
            if not isinstance(value, str):
                raise ValueError("the name of a tensor is not a text")
            return {value} if mark in _NAMING_MARKS else {value, lengths_name(value)}
        if mark == MARK + TIMESTEP and not _is_shape(value):
            raise ValueError("the shape of a row's timestep is not a list of sizes")
        if mark == MARK + "tuple" and not isinstance(value, list):
            raise ValueError("a tuple is not a list of items")
    return set().union(*(placed_tensors(item) for item in node.values()))


def lengths_name(name: str) -> str:
    """Returns the name of the tensor that holds the length of each row of a list of rows."""
    return f"{name}.lengths"


def _is_shape(node: Any) -> bool:
    return node is None or (isinstance(node, list) and all(type(size) is int and size > 0 for size in node))
