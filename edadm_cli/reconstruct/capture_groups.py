"""Which units are captured in one pass: as many of the next ones as the memory holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from edadm_cli.models.units import Unit
from edadm_cli.reconstruct.call_signatures import UnitForm


def next_group(
    units: Sequence[Unit], forms: Mapping[str, UnitForm], rows: int, with_layers: bool, fits: Callable[[int], bool]
) -> tuple[list[Unit], int]:
    """Returns the first units of `units` that are captured together, and the bytes that one of them needs to learn.

    The memory has to hold the calls of all of them, and beside these what one of them needs while it learns.

    Args:
        units: Units that are still to be captured, in the order of the network; at least one.
        forms: Shapes and types of each unit's calls.
        rows: Rows of the calibration set.
        with_layers: Whether the outputs of layers within units are learned too.
        fits: Whether so many bytes fit into the memory.
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
    """Returns the groups of all units where the memory is a budget in bytes."""
    groups: list[list[Unit]] = []
    rest = list(units)
    while rest:
        group, _ = next_group(rest, forms, rows, with_layers, lambda size: size <= budget)
        groups.append(group)
        rest = rest[len(group) :]
    return groups
