"""A contender in a process to itself: the others are neither in its memory nor in the way of its threads."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edadm_cli.bench.pipeline import PipelineRequest
from edadm_cli.bench.running import Running
from edadm_cli.bench.spec import Call, ContenderEnvironment, Spec
from edadm_cli.engines.base import LayerExecution, OperationTime
from edadm_cli.errors import EdadmError, MachineError

_STOP = "stop"
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


class ContenderLostError(MachineError):
    """The process of a contender ended before it was asked to.

    Args:
        name: The contender.
        exit_status: Of its process; negative for a signal, `None` where it is not known.
    """

    def __init__(self, name: str, exit_status: int | None) -> None:
        self.reason = reason_of(exit_status)
        super().__init__(
            f"The process of '{name}' ended before its time: {self.reason}.",
            hint="--no-compiled, or fewer --bits, if the memory does not suffice" if _is_killed(exit_status) else None,
        )


def reason_of(exit_status: int | None) -> str:
    """Say why a process ended, as the end of a sentence."""
    if _is_killed(exit_status):
        return f"signal {signal.SIGKILL}, killed, which happens where memory is used up"
    if exit_status is not None and exit_status < 0:
        return f"signal {-exit_status}, crashed"
    return f"exit code {exit_status}"


def _is_killed(exit_status: int | None) -> bool:
    return exit_status == -signal.SIGKILL


class RemoteRunning:
    """A `Running` in a process to itself; what goes wrong there is raised here.

    Raises:
        ContenderLostError: The process crashed or was killed.
    """

    def __init__(self, spec: Spec, environment: ContenderEnvironment, calls: Mapping[int, Sequence[Call]]) -> None:
        self.spec = spec
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        packed = {batch: [pack(call) for call in group] for batch, group in calls.items()}
        self._process = context.Process(target=_serve, args=(theirs, spec, environment, packed), daemon=True)
        with _threads_in_environment(environment.threads):
            self._process.start()
        theirs.close()
        try:
            facts = self._receive()
        except BaseException:
            self.close()
            raise
        self.prediction = torch.from_numpy(facts["prediction"])
        self.load_seconds: float = facts["load_seconds"]

    def warm_up(self, batch_size: int) -> float:
        """See `Running.warm_up`."""
        return float(self._ask("warm_up", batch_size))

    def time(self, batch_size: int, count: int) -> list[float]:
        """See `Running.time`."""
        return list(self._ask("time", batch_size, count))

    def memory(self) -> tuple[float | None, float | None]:
        """See `Running.memory`."""
        running, loading = self._ask("memory")
        return running, loading

    def layers(self) -> tuple[LayerExecution, ...]:
        """See `Running.layers`."""
        return tuple(self._ask("layers"))

    def profile(self, batch_size: int) -> list[OperationTime]:
        """See `Running.profile`."""
        return list(self._ask("profile", batch_size))

    def time_image(self, request: PipelineRequest) -> tuple[float, float]:
        """See `Running.time_image`."""
        seconds, in_denoiser = self._ask("time_image", request)
        return seconds, in_denoiser

    def close(self) -> None:
        """End the process."""
        with suppress(BrokenPipeError, OSError):
            self._connection.send(_STOP)
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            self._connection.send((method, arguments))
        except (BrokenPipeError, OSError) as error:
            raise self._gone() from error
        return self._receive()

    def _receive(self) -> Any:
        try:
            kind, value = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._gone() from error
        if kind == "done":
            return value
        message, hint, code = value
        failure = EdadmError(message, hint)
        failure.exit_code = code
        raise failure

    def _gone(self) -> ContenderLostError:
        self._process.join(timeout=5)
        return ContenderLostError(self.spec.name, self._process.exitcode)


def pack(value: Any) -> Any:
    """Turn the tensors of a call into arrays, which any process reads; calls never hold bfloat16, which has none."""
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy()
    return _mapped(value, pack)


def unpack(value: Any) -> Any:
    """Undo `pack`."""
    if isinstance(value, np.ndarray | np.generic):
        return torch.from_numpy(np.array(value))
    return _mapped(value, unpack)


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: function(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(function(item) for item in value)
    return value


def _serve(connection: Connection, spec: Spec, environment: ContenderEnvironment, packed: dict[int, list[Any]]) -> None:
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # stdout carries the command's result and nothing else
    # while it compiles, torch warns of a missing CUDA compiler even where there is no GPU
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    running: Running | None = None

    def begin() -> dict[str, Any]:
        nonlocal running
        calls = {batch: [unpack(call) for call in group] for batch, group in packed.items()}
        running = Running(spec, environment, calls)
        return {"prediction": running.prediction.numpy(), "load_seconds": running.load_seconds}

    _answer(connection, begin)
    while running is not None:
        try:
            message = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        if message == _STOP:
            return
        method, arguments = message
        _answer(connection, partial(getattr(running, method), *arguments))


def _answer(connection: Connection, work: Callable[[], Any]) -> None:
    try:
        connection.send(("done", work()))
    except EdadmError as error:
        connection.send(("failed", (error.message, error.hint, error.exit_code)))
    except Exception as error:  # noqa: BLE001 - the other process reports it
        if "--verbose" in sys.argv or "-v" in sys.argv:
            traceback.print_exc()
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        connection.send(("failed", (reason, None, EdadmError.exit_code)))


@contextmanager
def _threads_in_environment(threads: int) -> Iterator[None]:
    """Set the variables from which a new process reads its number of threads before it imports anything."""
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
