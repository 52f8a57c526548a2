"""Decides which units are captured in one pass: as many of the next ones as memory allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from edadm_cli.models.units import Unit
from edadm_cli.reconstruct.call_signatures import UnitForm


def next_group(
    units: Sequence[Unit], forms: Mapping[str, UnitForm], rows: int, with_layers: bool, fits: Callable[[int], bool]
) -> tuple[list[Unit], int]:
    """Returns the first units of `units` that are captured together, and the bytes that one of them needs to learn.

    The memory has to hold the calls of all of them, and in addition what one of them needs while it learns.

    Args:
        units: The units that are not captured yet, in the order of the network; at least one.
        forms: Shapes and types of each unit's calls.
        rows: Number of rows of the calibration set.
        with_layers: Whether the outputs of layers inside units are targets too.
        fits: Returns whether a number of bytes fits into memory.
    """
    group: list[Unit] = []
    calls = learning = 0
    for unit in units:
        form = forms[unit.name]
        all_calls = calls + form.call_bytes * rows
        most = max(learning, form.learning_bytes(with_layers) * rows)
        if group and not fits(all_calls + most):
            break
        group.append(unit)
        calls, learning = all_calls, most
    return group, learning


def capture_groups(
    units: Sequence[Unit], forms: Mapping[str, UnitForm], rows: int, budget: int, with_layers: bool
) -> list[list[Unit]]:
    """Returns the groups of all units, for a memory budget in bytes."""
    groups: list[list[Unit]] = []
    rest = list(units)
    while rest:
        group, _ = next_group(rest, forms, rows, with_layers, lambda size: size <= budget)
        groups.append(group)
        rest = rest[len(group) :]
    return groups
