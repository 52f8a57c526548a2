"""Replaces finished units by stubs that replay their outputs, so that capturing the next unit costs less.

Without stubs, the inputs of every unit would cost a forward of the denoiser from its start. A finished unit runs once
more, in the next pass, which stores its outputs. In later passes it is a stub: it returns the stored rows if something
that the pass computes depends on them, and zeros otherwise. The dependencies of units on each other are determined
once: one unit after the other returns NaN, and the inputs of later units show how far that spreads when all other units
replay their outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.hooks import Hooks
from edadm_cli.models.units import Unit
from edadm_cli.reconstruct.batches import Batches
from edadm_cli.reconstruct.call_signatures import UnitForm, flatten, unflatten
from edadm_cli.reconstruct.rows import RowCache, Rows


@dataclass(frozen=True)
class Link:
    """The output of a unit and the units that depend on it.

    Attributes:
        form: The tensors of one row of its calls.
        structure: The output without its tensors; see `call_signatures.flatten`.
        readers: Positions of the units whose inputs depend on the output directly, not through other units.
    """

    form: UnitForm
    structure: Any
    readers: frozenset[int]


def find_links(
    denoiser: nn.Module, units: Sequence[Unit], forms: Mapping[str, UnitForm], batches: Batches
) -> dict[str, Link]:
    """Returns the links of the units that can be stubs: all of their output tensors have rows.

    Args:
        denoiser: The denoiser, in full precision.
        units: All units, in execution order.
        forms: The forms of the units that can be stubs, by name.
        batches: The calibration set, of which one row is used.
    """
    args, kwargs = batches.few(1).call([0])
    able = [unit for unit in units if unit.name in forms and all(forms[unit.name].output_mask)]
    outputs: dict[str, tuple[Any, list[Tensor]]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            tensors: list[Tensor] = []
            outputs[name] = flatten(output, tensors, iter(forms[name].output_mask)), [t.clone() for t in tensors]

        return hook

    with torch.no_grad(), Hooks() as hooks:
        for unit in able:
            hooks.after(unit.module, keep(unit.name))
        denoiser(*args, **kwargs)
    return {
        unit.name: Link(forms[unit.name], outputs[unit.name][0], _readers(denoiser, units, outputs, unit, args, kwargs))
        for unit in able
        if unit.name in outputs
    }


def _readers(
    denoiser: nn.Module,
    units: Sequence[Unit],
    outputs: Mapping[str, tuple[Any, list[Tensor]]],
    poisoned: Unit,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> frozenset[int]:
    """Returns the positions of the units that a NaN in the output of `poisoned` reaches, all others replayed."""
    readers: set[int] = set()

    def look(position: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            tensors: list[Tensor] = []
            flatten((args, kwargs), tensors, _always())
            if any(tensor.is_floating_point() and bool(tensor.isnan().any()) for tensor in tensors):
                readers.add(position)

        return hook

    def give(name: str) -> Callable[..., Any]:
        structure, kept = outputs[name]
        spoils = name == poisoned.name

        def forward(*_: Any, **__: Any) -> Any:
            tensors = (torch.full_like(t, math.nan) if spoils and t.is_floating_point() else t.clone() for t in kept)
            return unflatten(structure, iter(tensors))

        return forward

    with torch.no_grad(), Hooks() as hooks:
        for position, unit in enumerate(units):
            hooks.before(unit.module, look(position), with_kwargs=True)
            if unit.name in outputs:
                hooks.enter_context(_forward_of(unit.module, give(unit.name)))
        denoiser(*args, **kwargs)
    return frozenset(readers)


class FinishedUnits:
    """The finished units of a partly quantized denoiser, during the passes that capture the next unit.

    Args:
        denoiser: The denoiser.
        units: All units, in execution order.
        links: The links of the units that can be stubs, by name.
        forms: The forms of the calls of all units that can learn, by name; a unit without a link may learn too.
        cache: Stores the outputs of finished units.
        num_rows: Number of rows of the calibration set.
        mixes_inputs: Whether a unit learns from its full-precision inputs too, so that both are held at once.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        units: Sequence[Unit],
        links: Mapping[str, Link],
        forms: Mapping[str, UnitForm],
        cache: RowCache,
        num_rows: int,
        mixes_inputs: bool = True,
    ) -> None:
        self.denoiser, self.links, self.forms, self.cache, self.num_rows = denoiser, links, forms, cache, num_rows
        self.positions = {unit.name: position for position, unit in enumerate(units)}
        self._always_run = {position for name, position in self.positions.items() if name not in links}
        self._finished: dict[str, list[Rows] | None] = {}  # None: not stored yet
        self._planned = self._plan(mixes_inputs)
        self._stored = self._loads(self._planned)

    def expected_bytes(self, names: Sequence[str] | None = None) -> int:
        """Returns the bytes of memory by which stored outputs may still grow, until the named units have learned."""
        places = self.positions.values() if names is None else (self.positions[name] for name in names)
        most = max((self._stored[place] for place in places), default=0)
        stored = (row for rows in self._finished.values() for row in rows or ())
        return max(0, most - sum(rows.bytes for rows in stored if rows.in_memory))

    def add(self, unit: Unit) -> None:
        """Registers a finished unit; the next pass stores its outputs."""
        self._finished[unit.name] = None

    @contextmanager
    def replaced(self, upcoming: Unit, places: Callable[[], Sequence[int]]) -> Iterator[None]:
        """Replaces finished units by stubs while entered, and stores the outputs of those that have none stored yet.

        Args:
            upcoming: The unit whose inputs the pass is for.
            places: Returns the row numbers of the running forward.
        """
        running = [name for name, rows in self._finished.items() if rows is None]
        computed = {self.positions[name] for name in running} | {self.positions[upcoming.name]}
        self._give_back(computed)
        with ExitStack() as stack:
            for name, rows in self._finished.items():
                if name in running:
                    continue
                is_read = bool(self.links[name].readers & computed)
                stub = self._stub(name, rows if is_read else None, places)
                stack.enter_context(_forward_of(self.denoiser.get_submodule(name), stub))
            for name in running:
                stack.callback(self._keep(name, self.positions[upcoming.name], places))
            yield

    def close(self) -> None:
        """Releases all stored outputs."""
        self._give_back(set())

    def _plan(self, mixes_inputs: bool) -> set[str]:
        """Returns the units whose outputs are stored in memory; those of the others are in files.

        While each unit learns, the outputs that live then fit beside the rows that it learns from. Outputs that live
        for a short time come first: the next passes read them, and those of skip connections are read once or twice.
        """
        if self.cache.shared:
            return set()
        loads = [0] * len(self.positions)
        for name, form in self.forms.items():
            replaced = 0 if mixes_inputs else sum(kind.bytes for kind in form.inputs)  # by the quantized ones
            need = form.call_bytes + form.learning_bytes(True) - replaced
            loads[self.positions[name]] = self.num_rows * need
        planned: set[str] = set()
        for name in sorted(self.links, key=lambda name: len(self._life(name))):
            life, size = self._life(name), self._bytes(name)
            if all(loads[place] + size <= self.cache.budget for place in life):
                planned.add(name)
                for place in life:
                    loads[place] += size
        return planned

    def _loads(self, names: Collection[str]) -> list[int]:
        """Returns the bytes of the stored outputs of some units, while each unit learns."""
        loads = [0] * len(self.positions)
        for name in names:
            for place in self._life(name):
                loads[place] += self._bytes(name)
        return loads

    def _life(self, name: str) -> range:
        """Returns the positions of the units that learn while an output is stored.

        The last reader runs once more in the pass for the unit after it, or in every pass if it can be no stub.
        """
        readers, end = self.links[name].readers, len(self.positions)
        first, last = self.positions[name] + 1, max(readers, default=-1)
        if last < first:
            return range(first, first)
        return range(first, end if readers & self._always_run else min(last + 2, end))

    def _bytes(self, name: str) -> int:
        return self.num_rows * sum(kind.bytes for kind in self.links[name].form.outputs)

    def _keep(self, name: str, position: int, places: Callable[[], Sequence[int]]) -> Callable[[], None]:
        """Stores the outputs of a unit that runs, if a later unit reads them; returns a function that ends this."""
        link = self.links.get(name)
        if link is None:
            return lambda: None  # it runs in every pass
        reserve = 0 if name in self._planned else self.cache.budget
        is_read = max(link.readers, default=-1) >= position
        kinds = link.form.outputs if is_read else ()
        kept = [self.cache.allocate(self.num_rows, kind, reserve) for kind in kinds]

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            tensors: list[Tensor] = []
            flatten(output, tensors, iter(link.form.output_mask))
            for tensor, rows in zip(tensors, kept, strict=True):
                rows.write(places(), tensor)

        hooks = Hooks()
        if kept:
            hooks.after(self.denoiser.get_submodule(name), hook)

        def end() -> None:
            hooks.close()
            self._finished[name] = kept

        return end

    def _stub(self, name: str, kept: list[Rows] | None, places: Callable[[], Sequence[int]]) -> Callable[..., Any]:
        link, device = self.links[name], next(self.denoiser.parameters()).device

        def forward(*_: Any, **__: Any) -> Any:
            count = len(places())
            if kept:
                tensors = [rows.kind.joined(rows.read(places()).to(device)) for rows in kept]
            else:
                kinds = link.form.outputs
                zeros = [torch.zeros((count, *kind.shape), dtype=kind.dtype, device=device) for kind in kinds]
                tensors = [kind.joined(zero) for kind, zero in zip(kinds, zeros, strict=True)]
            return unflatten(link.structure, iter(tensors))

        return forward

    def _give_back(self, computed: Collection[int]) -> None:
        """Releases the outputs that are read neither by units at the positions `computed` nor by any after them."""
        latest = max(computed, default=len(self.positions))
        for name, rows in self._finished.items():
            readers = self.links[name].readers if rows else frozenset()
            if rows and readers.isdisjoint(computed) and max(readers, default=-1) < latest:
                self.cache.release(rows)
                self._finished[name] = []


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replaces the `forward` of a module while entered; the module's hooks still run."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _always() -> Iterator[bool]:
    while True:
        yield True
