"""Runs work in a separate process, so that a library that crashes ends that process and not the command."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from edadm_cli.errors import EdadmError, MachineError
from edadm_cli.plugins import plugin_failure

_STOP = "stop"
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_PATIENCE_S = 5  # how long a process that was asked to end may take
_STDOUT, _STDERR = 1, 2

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")


class IsolatedProcess(Generic[T]):
    """Holds one object in a separate process and calls functions on it. Errors there are raised in this process.

    The process is a new interpreter, so it shares no threads with this one. It does not import the main module of the
    program that starts it, so a script needs no `if __name__ == "__main__"`.

    Args:
        lost: Returns the error for a process that crashed or was killed. Its argument is the exit status, which is
            negative for a signal and `None` if it is not known.
        make: Returns the object, in the separate process. It is a function at the top level of a module. Tensors among
            its arguments must be packed.
        arguments: The arguments of `make`.
        threads: The number of threads of the process; `None` leaves it to the environment.

    Raises:
        EdadmError: `make` raised an error, or the process was lost and `lost` returned this error.
    """

    def __init__(
        self,
        lost: Callable[[int | None], EdadmError],
        make: Callable[..., T],
        *arguments: Any,
        threads: int | None = None,
    ) -> None:
        self._lost = lost
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, partial(make, *arguments)), daemon=True)
        with _threads_in_environment(threads), _no_main_module(), _interrupts_held_back():
            self._process.start()
        theirs.close()
        try:
            self._receive()
        except BaseException as error:
            if not isinstance(error, Exception):  # an interrupt does not wait for a process that is still importing
                self._process.kill()
            self.close()
            raise

    def call(self, function: Callable[Concatenate[T, P], R], *arguments: P.args, **named: P.kwargs) -> R:
        """Returns `function(object, *arguments)`, computed in the separate process.

        Tensors among the arguments and in the result must be packed.

        Raises:
            EdadmError: The function raised an error, or the process was lost.
        """
        try:
            self._connection.send((function, arguments, named))
        except (BrokenPipeError, OSError) as error:
            raise self._gone() from error
        result: R = self._receive()
        return result

    def close(self) -> None:
        """Ends the process."""
        with suppress(BrokenPipeError, OSError):
            self._connection.send(_STOP)
        self._process.join(timeout=_PATIENCE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()

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
        self._process.join(timeout=_PATIENCE_S)
        return self._lost(self._process.exitcode)


class ProcessLostError(MachineError):
    """The error of a process that ended before it was asked to end.

    Args:
        what: What the process was doing, as the subject of a sentence.
        exit_status: The exit status of the process, which is negative for a signal and `None` if it is not known.
        hint: The next command to type.
        hint_if_killed: The next command to type if there may have been too little memory.
    """

    def __init__(
        self, what: str, exit_status: int | None, hint: str | None = None, hint_if_killed: str | None = None
    ) -> None:
        self.reason = reason_of(exit_status)
        chosen = hint_if_killed if _is_killed(exit_status) else hint
        super().__init__(f"{what} ended before its time: {self.reason}.", hint=chosen)


def reason_of(exit_status: int | None) -> str:
    """Returns the end of a sentence that says why a process ended."""
    if _is_killed(exit_status):
        return f"signal {signal.SIGKILL}, killed, which happens where memory is used up"
    if exit_status is not None and exit_status < 0:
        return f"signal {-exit_status}, crashed"
    return f"exit code {exit_status}"


def _is_killed(exit_status: int | None) -> bool:
    return exit_status == -signal.SIGKILL


def pack(value: Any) -> Any:
    """Returns a nested value with arrays in place of tensors, so that it can be sent to another process.

    A bfloat16 tensor becomes a float32 array, because NumPy has no bfloat16.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return _mapped(value, pack)


def unpack(value: Any) -> Any:
    """Returns a nested value with tensors in place of arrays, which reverses `pack`."""
    if isinstance(value, np.ndarray | np.generic):
        return torch.from_numpy(np.array(value))
    return _mapped(value, unpack)


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: function(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(function(item) for item in value)
    return value


def _serve(connection: Connection, make: Callable[[], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent process reports the interrupt
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    _write_to_stderr()
    # while it compiles, torch warns of a missing CUDA compiler even where there is no GPU, and of torchao's types
    for name in ("torch.utils.cpp_extension", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    served: list[Any] = []
    _answer(connection, lambda: served.append(make()))
    while served:
        try:
            message = connection.recv()
        except EOFError:
            return
        if message == _STOP:
            return
        function, arguments, named = message
        _answer(connection, partial(function, served[0], *arguments, **named))


def _write_to_stderr() -> None:
    """Redirects stdout to stderr in this process, because stdout is reserved for the command's result."""
    try:
        os.dup2(_STDERR, _STDOUT)
    except OSError:  # the command has no standard error
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)


def _answer(connection: Connection, work: Callable[[], Any]) -> None:
    try:
        connection.send(("done", work()))
    except EdadmError as error:
        connection.send(("failed", (error.message, error.hint, error.exit_code)))
    except Exception as error:  # noqa: BLE001 - the other process reports it
        if "--verbose" in sys.argv or "-v" in sys.argv:
            traceback.print_exc()
        failure = plugin_failure(error)
        if failure is not None:
            connection.send(("failed", (failure.message, failure.hint, failure.exit_code)))
            return
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        connection.send(("failed", (reason, None, EdadmError.exit_code)))


@contextmanager
def _no_main_module() -> Iterator[None]:
    """Returns a context in which a new process does not import the main module.

    The import would run a script without a `__main__` guard again.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Returns a context in which a new process begins with SIGINT held back, until it has set how to take it.

    An interpreter that is interrupted while it imports its modules would write a traceback.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _threads_in_environment(threads: int | None) -> Iterator[None]:
    """Returns a context in which the environment variables for the number of threads of a new process are set."""
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    if threads is not None:
        os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
