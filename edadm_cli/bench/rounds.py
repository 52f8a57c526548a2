"""Contenders timed in turns, so that whatever slows the machine down for a while slows them all.

Each round gives every contender one turn, and each round begins with another one. A turn is one call, or as many short
calls as fill a fifth of a second, after one that does not count.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from edadm_cli.artifacts import Latency

_TURN_MS = 200.0
_MOST_CALLS = 50


class Timed(Protocol):
    """What is timed; `Running` here or in another process."""

    def time(self, batch_size: int, count: int) -> list[float]:
        """Milliseconds of `count` calls."""

    def warm_up(self, batch_size: int) -> float:
        """Warm caches up; milliseconds of the last call."""


def calls_of_turn(call_ms: float) -> int:
    """How many calls a turn has, from the time of one."""
    return max(1, min(_MOST_CALLS, int(_TURN_MS / max(call_ms, 1e-3))))


def rotated(names: Sequence[str], by: int) -> list[str]:
    """The names in an order that begins `by` places later."""
    start = by % len(names)
    return [*names[start:], *names[:start]]


def time_in_rounds(
    contenders: Mapping[str, Timed],
    batch_size: int,
    rounds: int,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, list[float]]:
    """Milliseconds of every counted call of every contender.

    Args:
        contenders: By name.
        batch_size: Rows of a call.
        rounds: Turns of each.
        advance: Told of every turn.
    """
    counts = {name: calls_of_turn(contender.warm_up(batch_size)) for name, contender in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in rotated(list(contenders), number):
            count = counts[name]
            skipped = 1 if count > 1 else 0
            times[name] += contenders[name].time(batch_size, count + skipped)[skipped:]
            advance(1)
    return times


def summarize(times: Sequence[float]) -> Latency:
    """Median and spread."""
    return Latency(median=statistics.median(times), min=min(times), max=max(times), num_samples=len(times))
