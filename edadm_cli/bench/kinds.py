"""Shows where the time of a call goes: an engine's profile by kind of operation, with the rate of each kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from edadm_cli.artifacts import KindRow
from edadm_cli.bench.workload import WorkItem
from edadm_cli.engines.base import OperationTime
from edadm_cli.quant.plan import layer_of_part

_PRODUCTS = ("conv2d", "linear", "attention")


@dataclass
class _Group:
    milliseconds: float = 0.0
    names: list[str] = field(default_factory=list)


def rows_by_kind(
    times: Sequence[OperationTime], work: Sequence[WorkItem], peak_tops: Mapping[str, float]
) -> tuple[KindRow, ...]:
    """Sums a profile up by kind of operation, the longest first.

    The multiply-accumulates of a kind are those of the layers that its operations are named after. If an engine names
    its attention operations differently and all of them run in one precision, they count as all attention of the call.

    Args:
        times: The profile of one call.
        work: The products of the call, without what the engine leaves out; see `Engine.computed_call`.
        peak_tops: Maps a precision to the highest rate that was measured, in 10^12 operations per second.
    """
    groups: dict[tuple[str, str], _Group] = {}
    for time in times:
        if time.milliseconds <= 0:
            continue  # constants, and operations that were fused into another one
        group = groups.setdefault((time.kind, time.precision), _Group())
        group.milliseconds += time.milliseconds
        group.names.append(time.name)
    total = sum(group.milliseconds for group in groups.values())
    precisions = [precision for kind, precision in groups if kind == "attention"]
    rows = []
    for (kind, precision), group in groups.items():
        macs = _macs(kind, group.names, work, is_only=len(precisions) == 1) if kind in _PRODUCTS else 0
        tops = 2 * macs / (group.milliseconds * 1e9) if macs and group.milliseconds > 0 else None
        peak = peak_tops.get(precision)
        rows.append(
            KindRow(
                kind=kind,
                precision=precision,
                count=len(group.names),
                milliseconds=group.milliseconds,
                share=group.milliseconds / total if total > 0 else 0.0,
                gmacs=macs / 1e9 if macs else None,
                tops=tops,
                percent_of_peak=100 * tops / peak if tops is not None and peak else None,
            )
        )
    return tuple(sorted(rows, key=lambda row: row.milliseconds, reverse=True))


def _macs(kind: str, names: Sequence[str], work: Sequence[WorkItem], is_only: bool) -> int:
    is_attention = kind == "attention"
    products = [item for item in work if item.macs and item.kind.endswith("attention") == is_attention]
    if is_attention and is_only:
        return sum(item.macs for item in products)
    layers = {layer_of_part(name.partition(":")[0]) for name in names}
    return sum(item.macs for item in products if item.name in layers)
