"""Times the contenders in rounds, so that anything that slows the machine down for a while affects all of them.

In each round every contender has one turn, and each round begins with another contender. A turn is one call, or as many
short calls as take a fifth of a second, after one call that does not count.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from edadm_cli.artifacts import Latency

_TURN_MS = 200.0
_MOST_CALLS = 50
_STEADY_MEDIAN, _STEADY_MAX = 2.0, 10.0
"""Largest median and largest time of a machine at rest, in multiples of the smallest time."""

Attempt = Callable[[str, Callable[[], Any]], Any]


class Timed(Protocol):
    """A contender that can be timed: a `Running` in this process or in another one."""

    def time(self, batch_size: int, count: int) -> list[float]:
        """Returns the milliseconds of `count` calls."""

    def warm_up(self, batch_size: int) -> float:
        """Warms the caches up, and returns the milliseconds of the last call."""


def calls_of_turn(call_ms: float) -> int:
    """Returns the number of calls per turn, from the time of one call."""
    return max(1, min(_MOST_CALLS, int(_TURN_MS / max(call_ms, 1e-3))))


def rotated(names: Sequence[str], by: int) -> list[str]:
    """Returns the names in an order that begins `by` places later."""
    start = by % max(1, len(names))
    return [*names[start:], *names[:start]]


def time_in_rounds(
    contenders: Mapping[str, Timed],
    batch_size: int,
    rounds: int,
    advance: Callable[[int], None] = lambda _: None,
    attempt: Attempt = lambda _, call: call(),
) -> dict[str, list[float]]:
    """Returns the milliseconds of every counted call of every contender.

    Args:
        contenders: The contenders by name.
        batch_size: Rows per call.
        rounds: Number of turns of each contender.
        advance: Progress callback, called after every turn.
        attempt: Makes the calls of a contender; if it returns `None`, the contender is lost and has no more turns.
    """
    counts: dict[str, int] = {}
    for name, contender in contenders.items():
        call_ms = attempt(name, partial(contender.warm_up, batch_size))
        if call_ms is not None:
            counts[name] = calls_of_turn(call_ms)
    times: dict[str, list[float]] = {name: [] for name in counts}
    for number in range(rounds):
        for name in rotated(list(times), number):
            skipped = 1 if counts[name] > 1 else 0
            turn = attempt(name, partial(contenders[name].time, batch_size, counts[name] + skipped))
            if turn is None:
                del times[name]
            else:
                times[name] += turn[skipped:]
            advance(1)
    return times


def summarize(times: Sequence[float]) -> Latency:
    """Returns the median and the spread of times in milliseconds."""
    return Latency(median=statistics.median(times), min=min(times), max=max(times), num_samples=len(times))


def is_unsteady(latency: Latency) -> bool:
    """Returns whether times differ so much that other work must have slowed the machine down."""
    return latency.median > _STEADY_MEDIAN * latency.min or latency.max > _STEADY_MAX * latency.min
