"""Captures the inputs and outputs of units, in the full-precision and in the partly quantized network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.errors import MachineError
from edadm_cli.hooks import Hooks
from edadm_cli.models.families import Call
from edadm_cli.models.units import Unit
from edadm_cli.processes import ALONE, Processes
from edadm_cli.reconstruct.batches import Batches
from edadm_cli.reconstruct.call_signatures import UnitForm, flatten, unflatten
from edadm_cli.reconstruct.finished import FinishedUnits
from edadm_cli.reconstruct.rows import RowCache, Rows


@dataclass
class UnitCalls:
    """All calls of one unit over the calibration set: their arguments and outputs.

    `tensors[i]` has shape `[rows, ...]`, with rows in the order of the batches of the calibration set. Tensors without
    rows, such as position ids, are part of the structure, which is the tree of the arguments.
    """

    form: UnitForm
    tensors: list[Rows]
    outputs: list[Rows] = field(default_factory=list)
    structure: Any = None

    @property
    def rows(self) -> int:
        """Number of captured rows."""
        return self.tensors[0].count

    def call(self, tensors: Sequence[Tensor]) -> Call:
        """Returns the arguments `(args, kwargs)` of a call with these tensors in place of the captured ones."""
        args, kwargs = unflatten(self.structure, iter(tensors))
        return args, kwargs

    def outputs_of(self, result: Any) -> list[Tensor]:
        """Returns the tensors with rows among the outputs of the unit."""
        tensors: list[Tensor] = []
        flatten(result, tensors, iter(self.form.output_mask))
        return tensors


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
    finished: FinishedUnits | None = None,
) -> list[UnitCalls]:
    """Runs the denoiser over the calibration set and stores the calls of `units`.

    Each forward stops as soon as the last of `units` has run. A batch that does not fit into the device's memory is
    halved.

    Args:
        denoiser: The denoiser, in full precision or partly quantized.
        units: The units, in execution order.
        forms: The result of `probe_units`.
        batches: The calibration set.
        cache: Stores the rows.
        with_outputs: Whether outputs are stored too.
        reserve: Bytes of the memory budget that the rows leave free for later use.
        processes: The processes that share the batches.
        finished: Units before the first of `units` whose outputs need not be computed again.

    Raises:
        MachineError: One sample does not fit into the device's memory, or the disk is full.
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
        if finished is not None:
            stack.enter_context(finished.replaced(units[0], lambda: writer.places))
        numbers = range(processes.index, len(batches), processes.count)
        for number in numbers or (0,):  # a process without a batch needs the structure of the calls too
            _run(denoiser, batches, batches.indices()[number], writer)
            processes.check()
    processes.wait()
    return calls


def capture_call(
    unit: Unit, form: UnitForm, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int, cache: RowCache
) -> UnitCalls:
    """Runs one unit alone, with the arguments of a call of `rows` rows, and stores that call."""
    inputs, outputs = ([cache.allocate(rows, kind) for kind in kinds] for kinds in (form.inputs, form.outputs))
    call, writer = UnitCalls(form, inputs, outputs), _Writer()
    writer.places = list(range(rows))
    with torch.no_grad(), _recorded(unit.module, call, writer, is_last=False):
        unit.module(*args, **kwargs)
    return call


@contextmanager
def layer_outputs(denoiser: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collects the outputs of the named layers while entered, each from the layer's latest call."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            outputs[name] = output

        return hook

    with Hooks() as hooks:
        for name in names:
            hooks.after(denoiser.get_submodule(name), keep(name))
        yield outputs


class _EnoughError(Exception):
    """Ends a forward early; never leaves this module."""


class _Writer:
    """Writes the rows of the running forward to their positions."""

    def __init__(self) -> None:
        self.places: list[int] = []

    def write(self, tensors: Sequence[Tensor], rows: Sequence[Rows]) -> None:
        for tensor, row_store in zip(tensors, rows, strict=True):
            row_store.write(self.places, tensor.detach())


def _run(denoiser: nn.Module, batches: Batches, indices: list[int], writer: _Writer) -> None:
    """Runs one forward, or two with half the samples each if memory does not suffice."""
    writer.places = batches.rows(indices)
    try:
        args, kwargs = batches.call(indices)
        with suppress(_EnoughError):
            denoiser(*args, **kwargs)
        return
    except torch.OutOfMemoryError as error:
        if len(indices) == 1:
            raise MachineError(
                f"The memory of {batches.device} does not suffice for the denoiser's forward of one sample.",
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

    with Hooks() as hooks:
        hooks.before(module, before, with_kwargs=True)
        if call.outputs:
            hooks.after(module, after)
        yield
