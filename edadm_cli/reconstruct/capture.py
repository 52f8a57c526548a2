"""What flows into and out of units: inputs of full precision and of the partly quantized network, targets.

Which tensors of a call have a row for each sample, and which belong to the architecture (position ids), is not read off
one size that may coincide with another: two probes, of one sample and of the same sample twice, show what grows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.errors import InputError, MachineError
from edadm_cli.models.calibration import CalibrationSet
from edadm_cli.models.units import Unit
from edadm_cli.processes import ALONE, Processes
from edadm_cli.reconstruct.rows import RowCache, Rows, RowType


@dataclass(frozen=True)
class UnitForm:
    """What one row of a unit's calls is made of.

    Attributes:
        input_mask: For each tensor among the arguments, whether it has rows.
        inputs: Those that have.
        output_mask: The same of what comes out.
        outputs: Targets of the unit.
        layers: Outputs of the layers inside, but for the last: their targets.
    """

    input_mask: tuple[bool, ...]
    inputs: tuple[RowType, ...]
    output_mask: tuple[bool, ...]
    outputs: tuple[RowType, ...]
    layers: dict[str, RowType]

    @property
    def call_bytes(self) -> int:
        """Bytes of one row's full-precision inputs and outputs."""
        return sum(kind.bytes for kind in (*self.inputs, *self.outputs))

    def learning_bytes(self, with_layers: bool) -> int:
        """Bytes of what one row needs beside them while the unit learns."""
        layers = self.layers.values() if with_layers else ()
        return sum(kind.bytes for kind in (*self.inputs, *layers))


@dataclass
class UnitCalls:
    """Every call of one unit over the calibration set: the arguments as a tree, and what came out.

    `tensors[i]` has shape `[rows, ...]`, rows in the order of the calibration set's batches. Tensors without a row
    dimension, such as position ids, stay in the structure.
    """

    form: UnitForm
    tensors: list[Rows]
    outputs: list[Rows] = field(default_factory=list)
    structure: Any = None

    @property
    def rows(self) -> int:
        """Number of captured rows."""
        return self.tensors[0].count

    def call(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments `(args, kwargs)` of a call with these tensors in place of the captured ones."""
        args, kwargs = unflatten(self.structure, iter(tensors))
        return args, kwargs

    def outputs_of(self, result: Any) -> list[Tensor]:
        """The tensors with rows in what the unit returned."""
        tensors: list[Tensor] = []
        flatten(result, tensors, iter(self.form.output_mask))
        return tensors


class Batches:
    """The calibration set in batches, fed to a denoiser.

    Rows are numbered batch by batch: within one, those of the unconditional branch come first.
    """

    def __init__(
        self, calibration: CalibrationSet, batch_size: int, device: torch.device, num_samples: int | None = None
    ) -> None:
        self.calibration, self.batch_size, self.device = calibration, batch_size, device
        self.num_samples = len(calibration) if num_samples is None else num_samples

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    @property
    def num_rows(self) -> int:
        """Rows of the whole set."""
        return self.num_samples * self.calibration.branches

    def one_sample(self) -> Batches:
        """Just the first sample, for probes."""
        return Batches(self.calibration, 1, self.device, num_samples=1)

    def indices(self) -> list[list[int]]:
        """The samples of each batch."""
        starts = range(0, self.num_samples, self.batch_size)
        return [list(range(start, min(start + self.batch_size, self.num_samples))) for start in starts]

    def rows(self, indices: Sequence[int]) -> list[int]:
        """Numbers of the rows of some samples, in the order in which the denoiser gets them."""
        found = []
        for branch in range(self.calibration.branches):
            for index in indices:
                start = index - index % self.batch_size
                size = min(self.batch_size, self.num_samples - start)
                found.append(start * self.calibration.branches + branch * size + index - start)
        return found

    def call(self, indices: Sequence[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the denoiser for some samples."""
        return self.calibration.call(indices, self.device, torch.float32)

    def __iter__(self) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        return (self.call(indices) for indices in self.indices())


def probe_units(denoiser: nn.Module, units: Sequence[Unit], batches: Batches) -> dict[str, UnitForm]:
    """Find the form of every unit's calls, by two short forwards.

    Raises:
        InputError: A tensor grows with the number of samples in another way than by rows.
    """
    notes = [_note_shapes(denoiser, units, batches, count) for count in (1, 2)]
    branches = batches.calibration.branches
    forms = {}
    for unit in units:
        one, two = (found[unit.name] for found in notes)
        input_mask, inputs = _compare(unit.name, one.inputs, two.inputs, branches)
        output_mask, outputs = _compare(unit.name, one.outputs, two.outputs, branches)
        layers = {}
        for name in unit.layers[:-1]:
            (has_rows,), kinds = _compare(name, one.layers[name], two.layers[name], branches)
            if has_rows:
                layers[name] = kinds[0]
        forms[unit.name] = UnitForm(input_mask, inputs, output_mask, outputs, layers)
    return forms


def capture_units(
    denoiser: nn.Module,
    units: Sequence[Unit],
    forms: dict[str, UnitForm],
    batches: Batches,
    cache: RowCache,
    *,
    with_outputs: bool,
    reserve: int = 0,
    processes: Processes = ALONE,
) -> list[UnitCalls]:
    """Run the denoiser over the calibration set and keep the calls of `units`.

    Each forward stops as soon as the last of `units` has run. A batch that the device has no memory for is halved.

    Args:
        denoiser: In the precision that is wanted.
        units: In execution order.
        forms: As `probe_units` found them.
        batches: The calibration set.
        cache: Where the rows go.
        with_outputs: Whether outputs are kept too.
        reserve: Bytes of the budget that inputs leave to what comes after.
        processes: Those that share the batches.

    Raises:
        MachineError: The device has no memory for one sample, or the disk is full.
    """
    calls = []
    for unit in units:
        form = forms[unit.name]
        outputs = [cache.allocate(batches.num_rows, kind) for kind in form.outputs] if with_outputs else []
        inputs = [cache.allocate(batches.num_rows, kind, reserve) for kind in form.inputs]
        calls.append(UnitCalls(form, inputs, outputs))
    writer = _Writer()
    with torch.no_grad(), ExitStack() as stack:
        for position, (unit, call) in enumerate(zip(units, calls, strict=True)):
            stack.enter_context(_recorded(unit.module, call, writer, is_last=position == len(units) - 1))
        own = range(processes.index, len(batches), processes.count)
        for number in own or (0,):  # also a process without a batch learns the structure of the calls
            _run(denoiser, batches, batches.indices()[number], writer)
            processes.check()
    processes.wait()
    return calls


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


def flatten(tree: Any, tensors: list[Tensor], mask: Iterator[bool]) -> Any:
    """Move the tensors of a tree of tuples, lists and dictionaries to `tensors`; return the tree without them.

    Args:
        tree: The tree.
        tensors: Receives them.
        mask: For each tensor in turn, whether it is moved.
    """
    if isinstance(tree, Tensor):
        if not next(mask):
            return tree
        tensors.append(tree)
        return _PLACE
    if isinstance(tree, tuple | list):
        return type(tree)(flatten(item, tensors, mask) for item in tree)
    if isinstance(tree, dict):
        return {key: flatten(value, tensors, mask) for key, value in tree.items()}
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


class _Writer:
    """Where the rows of the running forward belong."""

    def __init__(self) -> None:
        self.places: list[int] = []

    def write(self, tensors: Sequence[Tensor], rows: Sequence[Rows]) -> None:
        for tensor, own in zip(tensors, rows, strict=True):
            own.write(self.places, tensor.detach())


def _run(denoiser: nn.Module, batches: Batches, indices: list[int], writer: _Writer) -> None:
    """One forward; or two of half the samples, where memory does not suffice."""
    writer.places = batches.rows(indices)
    try:
        args, kwargs = batches.call(indices)
        with suppress(_EnoughError):
            denoiser(*args, **kwargs)
        return
    except torch.OutOfMemoryError as error:
        if len(indices) == 1:
            raise MachineError(
                f"{batches.device} has no memory for the denoiser's forward of one sample.",
                hint="a smaller --memory-budget, or --device cpu",
            ) from error
    half = len(indices) // 2
    _run(denoiser, batches, indices[:half], writer)
    _run(denoiser, batches, indices[half:], writer)


@contextmanager
def _recorded(module: nn.Module, call: UnitCalls, writer: _Writer, is_last: bool) -> Iterator[None]:
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors: list[Tensor] = []
        call.structure = flatten((args, kwargs), tensors, iter(call.form.input_mask))
        writer.write(tensors, call.tensors)
        if is_last and not call.outputs:
            raise _EnoughError

    def after(_: nn.Module, __: Any, output: Any) -> None:
        writer.write(call.outputs_of(output), call.outputs)
        if is_last:
            raise _EnoughError

    handles = [module.register_forward_pre_hook(before, with_kwargs=True)]
    if call.outputs:
        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Shapes:
    """Sizes and element types of all tensors of one unit's call."""

    inputs: list[RowType] = field(default_factory=list)
    outputs: list[RowType] = field(default_factory=list)
    layers: dict[str, list[RowType]] = field(default_factory=dict)


@torch.no_grad()
def _note_shapes(denoiser: nn.Module, units: Sequence[Unit], batches: Batches, count: int) -> dict[str, _Shapes]:
    notes = {unit.name: _Shapes() for unit in units}

    def shapes(tree: Any) -> list[RowType]:
        tensors: list[Tensor] = []
        flatten(tree, tensors, itertools.repeat(True))
        return [RowType(tuple(tensor.shape), tensor.dtype) for tensor in tensors]

    def inputs_into(note: _Shapes) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            note.inputs = shapes((args, kwargs))

        return hook

    def outputs_into(note: _Shapes) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            note.outputs = shapes(output)

        return hook

    def layer_into(note: _Shapes, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            note.layers[name] = shapes(output)

        return hook

    args, kwargs = batches.call([0] * count)
    with ExitStack() as stack:
        for unit in units:
            note = notes[unit.name]
            stack.callback(unit.module.register_forward_pre_hook(inputs_into(note), with_kwargs=True).remove)
            stack.callback(unit.module.register_forward_hook(outputs_into(note)).remove)
            for name in unit.layers[:-1]:
                layer = denoiser.get_submodule(name)
                stack.callback(layer.register_forward_hook(layer_into(note, name)).remove)
        denoiser(*args, **kwargs)
    return notes


def _compare(
    name: str, one: list[RowType], two: list[RowType], branches: int
) -> tuple[tuple[bool, ...], tuple[RowType, ...]]:
    """Which tensors have rows, and what a row of those is, from calls of one and of two samples."""
    mask, kinds = [], []
    for first, second in zip(one, two, strict=True):
        grows = first != second
        if grows:
            expected = [(count * branches, *first.shape[1:]) for count in (1, 2)]
            if [first.shape, second.shape] != expected or first.dtype != second.dtype:
                raise InputError(
                    f"A tensor of '{name}' has shape {list(first.shape)} for one sample and {list(second.shape)} for "
                    "two, so it has no row for each sample, and the unit cannot be reconstructed."
                )
            kinds.append(RowType(first.shape[1:], first.dtype))
        mask.append(grows)
    return tuple(mask), tuple(kinds)
