"""Determines which tensors of a unit's calls have one row per sample, and what such a row looks like.

Other tensors belong to the architecture, such as position ids. A single call does not distinguish them, because sizes
may coincide. Two calls, of one row and of the same row twice, show which tensors grow with the number of rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.errors import InputError
from edadm_cli.hooks import Hooks
from edadm_cli.models.units import Unit
from edadm_cli.reconstruct.batches import Batches
from edadm_cli.reconstruct.rows import RowType

_REPEATS = 1e-3  # rows of one call and of another differ by rounding


@dataclass(frozen=True)
class UnitForm:
    """The tensors of one row of a unit's calls.

    Attributes:
        input_mask: Says for each tensor among the arguments whether it has rows.
        inputs: The row types of the input tensors that have rows.
        output_mask: Says for each output tensor whether it has rows.
        outputs: The row types of the output tensors that have rows, which are the targets of the unit.
        layers: The row types of the outputs of the layers inside except the last, which are targets too.
    """

    input_mask: tuple[bool, ...]
    inputs: tuple[RowType, ...]
    output_mask: tuple[bool, ...]
    outputs: tuple[RowType, ...]
    layers: dict[str, RowType]

    @property
    def call_bytes(self) -> int:
        """Bytes of the full-precision inputs and outputs of one row."""
        return sum(kind.bytes for kind in (*self.inputs, *self.outputs))

    def learning_bytes(self, with_layers: bool) -> int:
        """Returns the additional bytes per row while the unit learns, besides `call_bytes`."""
        layers = self.layers.values() if with_layers else ()
        return sum(kind.bytes for kind in (*self.inputs, *layers))


@dataclass
class Shapes:
    """Shapes and element types of all tensors of one call of a unit."""

    inputs: list[RowType] = field(default_factory=list)
    outputs: list[RowType] = field(default_factory=list)
    layers: dict[str, list[RowType]] = field(default_factory=dict)

    def form(self, name: str, rows: int) -> UnitForm:
        """Guesses the form from one call of `rows` rows: tensors whose first dimension has that length have rows.

        This is accurate enough for estimates. A constant may have the same length by chance; `probe_units` recognizes
        such constants.

        Raises:
            InputError: No input of the unit `name` has rows.
        """

        def split(tensors: list[RowType]) -> tuple[tuple[bool, ...], tuple[RowType, ...]]:
            mask = tuple(kind.shape[:1] == (rows,) for kind in tensors)
            if not any(mask):  # a row may have several entries, such as the frames of a clip
                mask = tuple(
                    kind.shape[:1] != () and kind.shape[0] > 0 and kind.shape[0] % rows == 0 for kind in tensors
                )
            kinds = [_row(kind, rows) for kind, has_rows in zip(tensors, mask, strict=True) if has_rows]
            return mask, tuple(kinds)

        input_mask, inputs = split(self.inputs)
        if not inputs:
            raise InputError(
                f"No input tensor of '{name}' has a row for each sample, so the unit cannot be reconstructed."
            )
        layers = {layer: kinds[0] for layer, tensors in self.layers.items() if (kinds := split(tensors)[1])}
        return UnitForm(input_mask, inputs, *split(self.outputs), layers)


@contextmanager
def noted_shapes(denoiser: nn.Module, units: Sequence[Unit]) -> Iterator[dict[str, Shapes]]:
    """Records the shapes in the latest call of every unit while entered; yields them by the unit's name."""
    notes = {unit.name: Shapes() for unit in units}

    def shapes(tree: Any) -> list[RowType]:
        tensors: list[Tensor] = []
        flatten(tree, tensors, itertools.repeat(True))
        return [_note(tensor) for tensor in tensors]

    def inputs_into(note: Shapes) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            note.inputs = shapes((args, kwargs))

        return hook

    def outputs_into(note: Shapes) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            note.outputs = shapes(output)

        return hook

    def layer_into(note: Shapes, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            note.layers[name] = shapes(output)

        return hook

    with Hooks() as hooks:
        for unit in units:
            note = notes[unit.name]
            hooks.before(unit.module, inputs_into(note), with_kwargs=True)
            hooks.after(unit.module, outputs_into(note))
            for name in unit.layers[:-1]:
                hooks.after(denoiser.get_submodule(name), layer_into(note, name))
        yield notes


def probe_units(denoiser: nn.Module, units: Sequence[Unit], batches: Batches) -> dict[str, UnitForm]:
    """Returns the form of every unit's calls, from forwards of one row and of the same row twice.

    Raises:
        InputError: A tensor's size does not grow in proportion to the number of samples.
    """
    notes = []
    for count in (1, 2):
        args, kwargs = batches.few(1).call([0] * count)
        with noted_shapes(denoiser, units) as shapes, torch.no_grad():
            denoiser(*args, **kwargs)
        notes.append(shapes)
    forms = {}
    for unit in units:
        one, two = (shapes[unit.name] for shapes in notes)
        input_mask, inputs = _compare(unit.name, one.inputs, two.inputs)
        output_mask, outputs = _compare(unit.name, one.outputs, two.outputs)
        layers = {}
        for name in unit.layers[:-1]:
            (has_rows,), kinds = _compare(name, one.layers[name], two.layers[name])
            if has_rows:
                layers[name] = kinds[0]
        forms[unit.name] = UnitForm(input_mask, inputs, output_mask, outputs, layers)
    return forms


def flatten(tree: Any, tensors: list[Tensor], mask: Iterator[bool]) -> Any:
    """Moves the tensors of a tree of tuples, lists and dictionaries to `tensors`; returns the tree without them.

    Args:
        tree: The tree.
        tensors: Receives them.
        mask: Says for each tensor in turn whether it is moved.
    """
    if isinstance(tree, Tensor):
        if not next(mask):
            return tree
        tensors.append(tree)
        return _SLOT
    if isinstance(tree, tuple | list):
        return type(tree)(flatten(item, tensors, mask) for item in tree)
    if isinstance(tree, dict):
        return {key: flatten(value, tensors, mask) for key, value in tree.items()}
    return tree


def unflatten(structure: Any, tensors: Iterator[Tensor]) -> Any:
    """Reverses `flatten`: puts the tensors back into the tree."""
    if structure is _SLOT:
        return next(tensors)
    if isinstance(structure, tuple | list):
        return type(structure)(unflatten(item, tensors) for item in structure)
    if isinstance(structure, dict):
        return {key: unflatten(value, tensors) for key, value in structure.items()}
    return structure


class _TensorSlot:
    """Marks the position of a tensor in a flattened tree."""


_SLOT = _TensorSlot()


def _row(kind: RowType, rows: int) -> RowType:
    """Returns the row type of a tensor with the type `kind` that holds `rows` rows."""
    entries, rest = kind.shape[0] // rows, kind.shape[1:]
    return RowType(rest if entries == 1 else (entries, *rest), kind.dtype, entries)


def _compare(name: str, one: list[RowType], two: list[RowType]) -> tuple[tuple[bool, ...], tuple[RowType, ...]]:
    """Returns which tensors have rows, and their row types, from calls of one row and of the same row twice."""
    mask, kinds = [], []
    for first, second in zip(one, two, strict=True):
        grows = (first.shape, first.dtype) != (second.shape, second.dtype)
        if grows:
            count = first.shape[0] if first.shape else 0
            is_multiple = count > 0 and second.shape == (2 * count, *first.shape[1:]) and first.dtype == second.dtype
            # several entries are one row only if the second half of the longer tensor repeats the first
            if not is_multiple or (count > 1 and not getattr(second, "repeats", False)):
                raise InputError(
                    f"A tensor of '{name}' has shape {list(first.shape)} for one sample and {list(second.shape)} for "
                    "two, so it has no row for each sample, and the unit cannot be reconstructed.",
                    hint=f'a recipe with [[layers]] pattern = "{name}*" and exclude = true leaves it in float',
                )
            kinds.append(_row(first, 1))
        mask.append(grows)
    return tuple(mask), tuple(kinds)


@dataclass(frozen=True)
class _Noted(RowType):
    """The type of a whole tensor, and whether its second half repeats its first."""

    repeats: bool = field(default=False, compare=False)


def _note(tensor: Tensor) -> RowType:
    half, odd = divmod(tensor.shape[0] if tensor.ndim else 1, 2)
    # a tensor of the meta device has no values, so that its shape alone counts
    repeats = not odd and (tensor.is_meta or torch.allclose(tensor[:half], tensor[half:], rtol=_REPEATS, atol=_REPEATS))
    return _Noted(tuple(tensor.shape), tensor.dtype, repeats=repeats)
