"""Times work on a GPU: medians of graph replays over inputs that exceed the cache, and rounds over contenders."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

L2_MULTIPLE = 3
"""Inputs rotate over so many times the second-level cache, as the weights of a network do between two steps."""
MAX_SETS = 48
MIN_LAUNCHES = 24


class Clock:
    """Times work on one device; on a CPU it reads the wall clock, so that every path can be tried without a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_cuda = device.type == "cuda"
        self.cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size if self.on_cuda else 0

    def wait(self) -> None:
        """Waits until everything that was launched has run."""
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def once(self, call: Callable[[], Any]) -> float:
        """Returns the milliseconds of one call after a warm-up."""
        if not self.on_cuda:
            started = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - started)
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        call()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last))

    def sets(self, bytes_per_call: int) -> int:
        """Returns how many sets of inputs exceed the cache."""
        return 1 if not self.on_cuda else max(1, min(MAX_SETS, -(-L2_MULTIPLE * self.cache_bytes // bytes_per_call)))

    def launch_us(self, launches: Sequence[Callable[[], Any]], replays: int = 7) -> float:
        """Returns the median microseconds per launch; one graph has all `launches`, and its first replay is ignored."""
        work = list(launches) * -(-MIN_LAUNCHES // len(launches)) if self.on_cuda else list(launches)[:1]

        def run_all() -> None:
            for launch in work:
                launch()

        if not self.on_cuda:
            run_all()
            return 1e3 * statistics.median(self.once(run_all) for _ in range(2)) / len(work)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for launch in launches:
                launch()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run_all()
        graph.replay()
        return 1e3 * statistics.median(self.once(graph.replay) for _ in range(replays)) / len(work)

    def in_turns(
        self, contenders: Mapping[str, Callable[[], Any]], rounds: int, calls: int = 3
    ) -> dict[str, list[float]]:
        """Returns the milliseconds of `rounds * calls` calls per contender, which alternate, after one warm-up call."""
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for call in contenders.values():
            call()
        self.wait()
        for _ in range(rounds):
            for name, call in contenders.items():
                call()
                times[name] += [self.once(call) for _ in range(calls)]
        return times


def spread(times: list[float]) -> dict[str, float]:
    """Returns the median, and the range of the middle 80%."""
    ordered = sorted(times)
    return {
        "median_ms": statistics.median(ordered),
        "p10_ms": ordered[len(ordered) // 10],
        "p90_ms": ordered[-1 - len(ordered) // 10],
        "calls": len(ordered),
    }
