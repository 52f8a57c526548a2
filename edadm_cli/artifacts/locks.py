"""Locks artifacts with one `flock` per artifact: exclusive for building, shared for reading.

Nothing waits: a process that cannot get the lock fails with an error that names the holder. A lock ends with its
process. A run that may not be written, such as one on a read-only disk, can still be read.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from edadm_cli.artifacts.files import explain_os_error, explained_os_errors
from edadm_cli.errors import InputError, MachineError, quoted

_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


class BeingReadError(InputError):
    """An artifact cannot be written, because other processes read it."""


class UnwritableError(MachineError):
    """An artifact cannot be written, because this process may not write its folder."""


def lock_path(artifact: Path) -> Path:
    """Returns the lock file of an artifact's folder, which is beside it and not affected by renames of the folder."""
    return artifact.with_name(f".{artifact.name}.lock")


@contextmanager
def write_lock(artifact: Path) -> Iterator[None]:
    """Holds an artifact's exclusive lock.

    Raises:
        BeingReadError: Another process reads the artifact.
        InputError: Another process writes it.
        UnwritableError: Permission is denied, or the disk is read-only.
    """
    with _opened(artifact) as descriptor:
        if not _try(artifact, descriptor, fcntl.LOCK_EX):
            if not _try(artifact, descriptor, fcntl.LOCK_SH):
                raise _being_written(artifact, descriptor)
            # either others read it, or the process that wrote it ended between the two attempts
            if not _try(artifact, descriptor, fcntl.LOCK_EX):
                raise BeingReadError(
                    f"{artifact} is being read by another process.", hint="wait until it ends, then try again"
                )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield


@contextmanager
def read_lock(artifact: Path) -> Iterator[None]:
    """Holds an artifact's shared lock, so that nobody replaces it; without one where no lock can be made.

    Raises:
        InputError: Another process writes the artifact.
    """
    with ExitStack() as stack:
        with suppress(UnwritableError):
            descriptor = stack.enter_context(_opened(artifact))
            if not _try(artifact, descriptor, fcntl.LOCK_SH):
                raise _being_written(artifact, descriptor)
        yield


@contextmanager
def _opened(artifact: Path) -> Iterator[int]:
    path = lock_path(artifact)
    with explained_os_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with explained_os_errors(path):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        except OSError as error:
            explained = explain_os_error(error, path)
            if explained is not None and error.errno in _UNWRITABLE:
                raise UnwritableError(explained.message, explained.hint) from error
            raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InputError(f"{path} is not a regular file, so it cannot be a lock.", hint=quoted("rm", path))
        yield descriptor
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for a forked child that inherited the descriptor
        os.close(descriptor)


def _try(artifact: Path, descriptor: int, operation: int) -> bool:
    with explained_os_errors(lock_path(artifact)):
        try:
            fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _being_written(artifact: Path, descriptor: int) -> InputError:
    owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
    who = f"another process (pid {owner})" if owner.isdigit() else "another process"
    return InputError(
        f"{artifact} is being written by {who}.", hint="wait until it ends, or use another folder with --run"
    )
