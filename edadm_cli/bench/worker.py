"""A contender in a process of its own: nothing of the others is in its memory, and their threads are not in its way."""

from __future__ import annotations

import logging
import multiprocessing
import os
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

from edadm_cli.bench.contender import Call, Running, Setting, Spec
from edadm_cli.engines.base import LayerExecution, OperationTime
from edadm_cli.errors import EdadmError, MachineError

_STOP = "stop"
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


class RemoteRunning:
    """A `Running` in a process of its own; what goes wrong there is raised here.

    Raises:
        MachineError: The process was killed, most often for its memory.
    """

    def __init__(self, spec: Spec, setting: Setting, calls: Mapping[int, Sequence[Call]]) -> None:
        self.spec = spec
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        packed = {batch: [pack(call) for call in found] for batch, found in calls.items()}
        self._process = context.Process(target=_serve, args=(theirs, spec, setting, packed), daemon=True)
        with _threads_in_environment(setting.threads):
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

    def draw(self, request: Any) -> tuple[float, float]:
        """See `Running.draw`."""
        seconds, in_denoiser = self._ask("draw", request)
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

    def _gone(self) -> EdadmError:
        self._process.join(timeout=5)
        return MachineError(
            f"The process of '{self.spec.name}' ended with {self._process.exitcode}; its memory may have been used up.",
            hint="--no-compiled, or fewer --bits",
        )


def pack(value: Any) -> Any:
    """The tensors of a call as arrays, which any process reads; bfloat16 has none, and no call comes in it."""
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy()
    return _mapped(value, pack)


def unpack(value: Any) -> Any:
    """The inverse of `pack`."""
    if isinstance(value, np.ndarray | np.generic):
        return torch.from_numpy(np.array(value))
    return _mapped(value, unpack)


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: function(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(function(item) for item in value)
    return value


def _serve(connection: Connection, spec: Spec, setting: Setting, packed: dict[int, list[Any]]) -> None:
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # stdout carries the command's result and nothing else
    # torch remarks, while it compiles, on a CUDA compiler where no GPU is
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    running: Running | None = None

    def begin() -> dict[str, Any]:
        nonlocal running
        calls = {batch: [unpack(call) for call in found] for batch, found in packed.items()}
        running = Running(spec, setting, calls)
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
    except Exception as error:  # noqa: BLE001 - the other process tells it
        if "--verbose" in sys.argv or "-v" in sys.argv:
            traceback.print_exc()
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        connection.send(("failed", (reason, None, EdadmError.exit_code)))


@contextmanager
def _threads_in_environment(threads: int) -> Iterator[None]:
    """What a new process reads its number of threads from, before it imports anything."""
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
