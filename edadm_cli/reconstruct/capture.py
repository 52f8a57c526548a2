"""What flows into and out of units: inputs of full precision and of the partly quantized network, targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.models.calibration import CalibrationSet
from edadm_cli.models.units import Unit


@dataclass
class UnitCalls:
    """Every call of one unit over the calibration set: the arguments as a tree, and what came out.

    `tensors[i]` has shape `[rows, ...]`, rows in the order of the calibration set's batches. Tensors without a row
    dimension, such as position ids, stay in the structure.
    """

    structure: Any = None
    tensors: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Number of captured rows."""
        return self.tensors[0].shape[0]

    def call(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments `(args, kwargs)` of a call with these tensors in place of the captured ones."""
        args, kwargs = unflatten(self.structure, iter(tensors))
        return args, kwargs


class Batches:
    """The calibration set in batches, fed to a denoiser."""

    def __init__(
        self, calibration: CalibrationSet, batch_size: int, device: torch.device, num_samples: int | None = None
    ) -> None:
        self.calibration, self.batch_size, self.device = calibration, batch_size, device
        self.num_samples = len(calibration) if num_samples is None else num_samples

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def one_sample(self) -> Batches:
        """Just the first sample, for probes."""
        return Batches(self.calibration, 1, self.device, num_samples=1)

    @staticmethod
    def rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Rows of a call: the first dimension of the first tensor, the noisy sample."""
        tensors: list[Tensor] = []
        flatten((args, kwargs), tensors, None)
        return tensors[0].shape[0]

    def __iter__(self) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        for start in range(0, self.num_samples, self.batch_size):
            stop = min(start + self.batch_size, self.num_samples)
            yield self.calibration.call(range(start, stop), self.device, torch.float32)


def capture_units(denoiser: nn.Module, units: Sequence[Unit], batches: Batches, with_outputs: bool) -> list[UnitCalls]:
    """Run the denoiser over the calibration set and keep the calls of `units`.

    Each forward stops as soon as the last of `units` has run.
    """
    kept = [_Pieces() for _ in units]
    with torch.no_grad(), ExitStack() as stack:
        for position, (unit, pieces) in enumerate(zip(units, kept, strict=True)):
            is_last = position == len(units) - 1
            stack.enter_context(_recorded(unit.module, pieces, with_outputs, is_last))
        for args, kwargs in batches:
            rows = batches.rows(args, kwargs)
            for pieces in kept:
                pieces.rows = rows
            with suppress(_EnoughError):
                denoiser(*args, **kwargs)
    return [pieces.joined() for pieces in kept]


@contextmanager
def layer_outputs(denoiser: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect what the named layers give, newest call only, while entered."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            outputs[name] = output

        return hook

    handles = [denoiser.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def flatten(tree: Any, tensors: list[Tensor], rows: int | None) -> Any:
    """Move the tensors of a tree of tuples, lists and dictionaries to `tensors`; return the tree without them.

    With `rows`, only tensors whose first dimension has that size are moved.
    """
    if isinstance(tree, Tensor):
        if rows is not None and (tree.dim() == 0 or tree.shape[0] != rows):
            return tree
        tensors.append(tree)
        return _PLACE
    if isinstance(tree, tuple | list):
        return type(tree)(flatten(item, tensors, rows) for item in tree)
    if isinstance(tree, dict):
        return {key: flatten(value, tensors, rows) for key, value in tree.items()}
    return tree


def unflatten(structure: Any, tensors: Iterator[Tensor]) -> Any:
    """Undo `flatten`."""
    if structure is _PLACE:
        return next(tensors)
    if isinstance(structure, tuple | list):
        return type(structure)(unflatten(item, tensors) for item in structure)
    if isinstance(structure, dict):
        return {key: unflatten(value, tensors) for key, value in structure.items()}
    return structure


class _Place:
    """Marks where a tensor stood in a flattened tree."""


_PLACE = _Place()


class _EnoughError(Exception):
    """Ends a forward early; never leaves this module."""


class _Pieces:
    def __init__(self) -> None:
        self.rows = 0
        self.structure: Any = None
        self.tensors: list[list[Tensor]] = []
        self.outputs: list[list[Tensor]] = []

    def joined(self) -> UnitCalls:
        return UnitCalls(
            self.structure,
            [torch.cat(pieces) for pieces in zip(*self.tensors, strict=True)],
            [torch.cat(pieces) for pieces in zip(*self.outputs, strict=True)],
        )


@contextmanager
def _recorded(module: nn.Module, pieces: _Pieces, with_outputs: bool, is_last: bool) -> Iterator[None]:
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors: list[Tensor] = []
        pieces.structure = flatten((args, kwargs), tensors, pieces.rows)
        pieces.tensors.append([tensor.detach().clone() for tensor in tensors])
        if is_last and not with_outputs:
            raise _EnoughError

    def after(_: nn.Module, __: Any, output: Any) -> None:
        tensors: list[Tensor] = []
        flatten(output, tensors, pieces.rows)
        pieces.outputs.append([tensor.detach().clone() for tensor in tensors])
        if is_last:
            raise _EnoughError

    handles = [module.register_forward_pre_hook(before, with_kwargs=True)]
    if with_outputs:
        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
