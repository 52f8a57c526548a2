"""The running contenders of a bench: started one after the other, timed together, left out if their process is lost."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from edadm_cli.bench.memory import require_memory
from edadm_cli.bench.rounds import time_in_rounds
from edadm_cli.bench.running import Running
from edadm_cli.bench.spec import Call, ContenderEnvironment, Spec
from edadm_cli.bench.worker import ContenderLostError, RemoteRunning
from edadm_cli.engines.base import CompiledDenoiser
from edadm_cli.errors import EdadmError
from edadm_cli.progress import Reporter

Participant = Running | RemoteRunning
T = TypeVar("T")


class Participants:
    """The contenders of a bench while they run.

    A contender that raises an error, or whose process crashes or is killed, is left out with the reason, and the others
    continue. The error of a required contender is raised, because there is nothing to report without it.

    Args:
        environment: Device, threads and processes of the contenders.
        calls: The calls that are timed, by batch size.
        required: Names of the contenders that the result needs: the quantized ones, and float32 in eager torch.
        reporter: Receives progress and warnings.
    """

    def __init__(
        self,
        environment: ContenderEnvironment,
        calls: Mapping[int, Sequence[Call]],
        required: Collection[str],
        reporter: Reporter,
    ) -> None:
        self._environment, self._calls, self._reporter = environment, calls, reporter
        self._required = required
        self._running: dict[str, Participant] = {}
        self.left_out: dict[str, str] = {}

    def __getitem__(self, name: str) -> Participant:
        return self._running[name]

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._running))

    def __len__(self) -> int:
        return len(self._running)

    def start(self, spec: Spec, source: Callable[[], CompiledDenoiser] | None) -> None:
        """Loads a contender and calls it once, in a process of its own if the environment asks for that.

        Args:
            spec: The contender.
            source: Compiles it in this process, if it has no files.
        """
        self._reporter.note(f"loading {spec.name}")
        participant = self._attempt(spec.name, partial(self._started, spec, source))
        if participant is not None:
            self._running[spec.name] = participant

    def each(
        self, function: Callable[[Participant], T], advance: Callable[[int], None] = lambda _: None
    ) -> dict[str, T]:
        """Applies a function to every contender, and returns the results by name."""
        results = {}
        for name in self:
            result = self._attempt(name, partial(function, self._running[name]))
            if result is not None:
                results[name] = result
            advance(1)
        return results

    def time(self, batch_size: int, rounds: int) -> dict[str, list[float]]:
        """Times all contenders in turns; see `bench.rounds`."""
        with self._reporter.task(f"Timing, batch {batch_size}", rounds * len(self)) as advance:
            return time_in_rounds(dict(self._running), batch_size, rounds, advance, self._attempt)

    def leave_out(self, name: str, reason: str) -> None:
        """Leaves a contender out and warns of it with the reason."""
        participant = self._running.pop(name, None)
        if isinstance(participant, RemoteRunning):
            participant.close()
        self.left_out[name] = reason
        self._reporter.warn(f"{name} is left out: {reason}.")

    def close(self) -> None:
        """Ends the contenders' processes."""
        for participant in self._running.values():
            if isinstance(participant, RemoteRunning):
                participant.close()
        self._running.clear()

    def _attempt(self, name: str, call: Callable[[], T]) -> T | None:
        """Returns the result of a call of a contender; `None` if an error of the call means that it is left out."""
        try:
            return call()
        except Exception as error:
            if name in self._required:
                raise
            reason = error.reason if isinstance(error, ContenderLostError) else reason_of_error(error)
            self.leave_out(name, reason)
        return None

    def _started(self, spec: Spec, source: Callable[[], CompiledDenoiser] | None) -> Participant:
        environment = self._environment
        if environment.is_alone and source is None:
            require_memory(spec.name, spec.size_mib)
            return RemoteRunning(spec, environment, self._calls)
        if environment.is_alone:
            self._reporter.warn(f"{spec.name} has no files and runs in the program itself: its memory is not measured.")
        return Running(spec, replace(environment, is_alone=False), self._calls, source)


def reason_of_error(error: Exception) -> str:
    """Returns a short description of what went wrong with a contender."""
    text = error.message if isinstance(error, EdadmError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split()).removesuffix(".")[:300]
