"""Several processes at one stage, as a launcher starts them (see `launching`).

The processes meet through accelerate's `PartialState`, which reads the launcher's environment variables; accelerate's
own configuration file is not needed. Beside the process group they share a small store of keys, through which they wait
for each other, pass small values from the main process to the others, and report failures. Each process writes a
heartbeat every two seconds. A process that waits for the others checks their heartbeats: one without any for a minute
is lost, and the others end with a sentence instead of waiting for ever.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from edadm_cli.errors import EXIT_INTERNAL, EdadmError, MachineError
from edadm_cli.launching import launched_count, require_meeting_place

if TYPE_CHECKING:
    from accelerate import PartialState
    from torch import Tensor
    from torch.distributed import Store

RESUME_HINT = "type the same command again: it goes on where it was"
_PATIENCE_S = 60.0  # a process without a heartbeat for so long is lost
_BEAT_S = 2.0
_LOOK_S = 0.5
_POLL_S = 0.02
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)


class LostProcessError(MachineError):
    """Another process of the run died."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"Process {index} of the run {reason}.", hint=RESUME_HINT)
        self.index = index


class Processes:
    """One process on its own, which waits for nobody.

    Attributes:
        index: The index of this process, from 0; process 0 is the main one, which alone writes artifacts and prints.
        count: How many there are.
    """

    index: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes artifacts and prints."""
        return self.index == 0

    def device_name(self, name: str) -> str:
        """Returns the device of this process for `--device` `name`: a GPU of its own for `cuda` or `auto`."""
        return name

    def wait(self) -> None:
        """Waits until all processes have called it.

        Raises:
            LostProcessError: One of them died.
            EdadmError: One of them failed, and this is its failure.
        """

    def check(self) -> None:
        """Raises the failure of another process, if there is one; does not wait."""

    def share(self, value: Any) -> Any:
        """Returns the main process's value in every process; it must be a JSON value."""
        return value

    def sum(self, tensor: Tensor) -> None:
        """Adds up a tensor over all processes, in place."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """Reports a failure of the body to the others; where it succeeds, all leave together."""
        yield


class Team(Processes):
    """Several processes of one launcher.

    Args:
        store: The store of keys that all processes share.
        index: The index of this process.
        count: The number of processes.
        local_index: The index of this process on its own machine, which is the index of its GPU.
    """

    def __init__(self, store: Store, index: int, count: int, local_index: int) -> None:
        self.index, self.count = index, count
        self._store, self._local_index = store, local_index
        self._meetings = 0
        self._seen = {other: ("", time.monotonic()) for other in range(count) if other != index}
        self._stopped = threading.Event()
        self._heart: threading.Thread | None = None

    def device_name(self, name: str) -> str:
        """Returns `cuda:N` of this process for `cuda`, and for `auto` on a machine with GPUs."""
        import torch

        if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
            return f"cuda:{self._local_index % max(1, torch.cuda.device_count())}"
        return name

    def wait(self) -> None:
        """Waits until all processes have called it."""
        self._meetings += 1
        self._set(f"here/{self._meetings}/{self.index}", "")
        for other in self._seen:
            self._await(f"here/{self._meetings}/{other}")

    def check(self) -> None:
        """Raises another process's failure."""
        for other in self._seen:
            failure = self._get(f"failed/{other}")
            if failure is not None:
                raise _failure(failure)

    def share(self, value: Any) -> Any:
        """Returns the main process's value in every process."""
        self._meetings += 1
        key = f"value/{self._meetings}"
        if self.is_main:
            self._set(key, json.dumps(value))
            return value
        return json.loads(self._await(key))

    def sum(self, tensor: Tensor) -> None:
        """Adds up a tensor over all processes, in place: each gets the same bytes."""
        import torch

        try:
            torch.distributed.all_reduce(tensor)
        except RuntimeError as error:  # what the backends raise for a peer that has gone
            self._look_for_a_failure()
            raise LostProcessError(0 if self.index else 1, "ended, or another one of it did") from error

    @contextmanager
    def together(self) -> Iterator[None]:
        """Reports a failure of the body to the others; where it succeeds, all leave together."""
        atexit.unregister(_disconnect)
        self._start_heart()
        try:
            with self._told_to_end():
                yield
                self._leave()
            atexit.register(_disconnect)
        except BaseException as error:
            if not isinstance(error, LostProcessError):
                self._tell(error)
            raise
        finally:
            self._stop_heart()

    def _leave(self) -> None:
        """Makes the main process leave last: the store may live in it."""
        self._set(f"left/{self.index}", "")
        for other in self._seen if self.is_main else ():
            self._await(f"left/{other}")

    @contextmanager
    def _told_to_end(self) -> Iterator[None]:
        """Turns SIGTERM into a failure: launchers send it to the remaining processes when one has died."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def end(number: int, frame: object) -> None:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._look_for_a_failure()
            raise LostProcessError(self.index if self.is_main else 0, "was ended, or another one of it died")

        before = signal.signal(signal.SIGTERM, end)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _start_heart(self) -> None:
        self._stopped.clear()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._heart.start()

    def _stop_heart(self) -> None:
        self._stopped.set()
        if self._heart is not None:
            self._heart.join()

    def _beat(self) -> None:
        while True:
            try:
                self._store.set(f"alive/{self.index}", str(time.monotonic()))
            except RuntimeError:  # the store went with its process; whoever waits finds out
                return
            if self._stopped.wait(_BEAT_S):
                return

    def _tell(self, error: BaseException) -> None:
        """Reports a failure in the store; where that is impossible, the others miss the heartbeat."""
        failure: dict[str, Any] = {
            "message": f"Process {self.index} of the run failed: {type(error).__name__}: {error}"
        }
        if isinstance(error, EdadmError):
            failure = {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}
        try:
            self._store.set(f"failed/{self.index}", json.dumps(failure))
        except RuntimeError:
            return

    def _look_for_a_failure(self) -> None:
        """Looks for the report of a process that failed, which may come a moment after the broken connection."""
        until = time.monotonic() + _LOOK_S
        while time.monotonic() < until:
            self.check()
            time.sleep(_POLL_S)

    def _await(self, key: str) -> str:
        looked = 0.0
        while (value := self._get(key)) is None:
            if time.monotonic() - looked > _LOOK_S:
                looked = time.monotonic()
                self.check()
                self._look_after_others()
            time.sleep(_POLL_S)
        return value

    def _look_after_others(self) -> None:
        now = time.monotonic()
        for other, (sign, since) in self._seen.items():
            newest = self._get(f"alive/{other}") or ""
            if newest != sign:
                self._seen[other] = (newest, now)
            elif now - since > _PATIENCE_S:
                raise LostProcessError(other, f"has had no heartbeat for {_PATIENCE_S:.0f} seconds")

    def _get(self, key: str) -> str | None:
        try:
            return self._store.get(key).decode() if self._store.check([key]) else None
        except RuntimeError as error:
            raise LostProcessError(0, "ended, and with it the store that all share") from error

    def _set(self, key: str, value: str) -> None:
        try:
            self._store.set(key, value)
        except RuntimeError as error:
            raise LostProcessError(0, "ended, and with it the store that all share") from error


ALONE = Processes()
_JOINED = itertools.count()  # the stages of one command meet in the same order everywhere


def join(device: str) -> Processes:
    """Meets the other processes of the launcher, where there are some.

    Args:
        device: `--device`: `cpu` has the processes talk through gloo, a GPU through its own backend.

    Raises:
        MachineError: They cannot be reached, or the launcher has started one process instead of several.
    """
    require_meeting_place()
    count = launched_count()
    if count == 1:
        return ALONE
    import torch
    from accelerate import PartialState

    on_cpu = device == "cpu" or not torch.cuda.is_available()
    try:
        state = PartialState(cpu=on_cpu, timeout=_COLLECTIVE_TIMEOUT)
        store = _shared_store(state)
    except (RuntimeError, ValueError) as error:
        raise MachineError(f"The {count} processes of the run cannot reach each other: {error}") from error
    return Team(store, state.process_index, state.num_processes, state.local_process_index)


def _shared_store(state: PartialState) -> Store:
    """Returns the launcher's own store, which outlives every process, or else a store of the main process."""
    from accelerate.utils import broadcast_object_list
    from torch.distributed import PrefixStore, TCPStore

    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        attempt = f"edadm/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_JOINED)}"
        return PrefixStore(attempt, TCPStore(host, int(os.environ["MASTER_PORT"]), is_master=False))
    server = TCPStore(host, 0, is_master=True, wait_for_workers=False) if state.is_main_process else None
    (port,) = broadcast_object_list([None if server is None else server.port])
    return server or TCPStore(host, port, is_master=False)


def _disconnect() -> None:
    """Ends the threads of the process group while the interpreter still runs.

    One of them may hold the last reference to a tensor. If it releases it while the interpreter ends, Python stops that
    thread and the process is aborted, although its work is done. After a failure the group is left as it is: its
    threads may wait for a process that is no longer there.
    """
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _failure(text: str) -> EdadmError:
    content = json.loads(text)
    error = EdadmError(content["message"], hint=content.get("hint"))
    error.exit_code = content.get("exit_code", EXIT_INTERNAL)
    return error
