"""Reads and writes files. A written file is either whole or absent: it is written elsewhere, synced, and renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

from edadm_cli.artifacts.json_text import dump_json, parse_json
from edadm_cli.errors import EdadmError, InputError, MachineError

MAX_JSON_BYTES = 2**29
_MACHINE_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission is denied",
    errno.EPERM: "the operation is not permitted",
    errno.EROFS: "the file system is read-only",
    errno.EFBIG: "the file would be larger than this process may write (ulimit -f)",
    errno.EMFILE: "too many files are open",
    errno.ENFILE: "too many files are open",
    errno.ENOLCK: "this file system has no locks, which keep two processes from writing one artifact",
    errno.EOPNOTSUPP: "this file system does not support the operation",
    errno.ESTALE: "the file server no longer knows this file",
    errno.ETIMEDOUT: "the file server does not answer",
    errno.EIO: "the disk reports an input/output error",
    errno.ENOMEM: "memory is used up",
}
TEMPORARY = ".edadm-tmp"
_SETTLED_NS = 2 * 10**9
_THREADS = 8
_hashes: dict[tuple[int, int, int, int], str] = {}

Item = TypeVar("Item")
Result = TypeVar("Result")
_SHOWN_OF_LONG_NAMES = 60
_NO_TEMPORARY_FOLDER = "No usable temporary directory found"  # the beginning of what Python's tempfile says


def explain_os_error(error: OSError, place: str | os.PathLike[str] | None = None) -> EdadmError | None:
    """Turns an operating-system error that the user can mend into one sentence; `None` for any other."""
    where = place if place is not None else error.filename
    named = f"{where}: " if where is not None else ""
    if str(error.strerror).startswith(_NO_TEMPORARY_FOLDER):
        return MachineError(
            "There is no folder for temporary files that can be written.", hint="set TMPDIR to a folder with free space"
        )
    if error.errno in _MACHINE_REASONS:
        hint = (
            "free some space, or use another folder with --run" if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
        )
        return MachineError(f"{named}{_MACHINE_REASONS[error.errno]}.", hint=hint)
    if error.errno == errno.ENAMETOOLONG:
        return InputError(f"{str(where)[:_SHOWN_OF_LONG_NAMES]}...: this name is longer than a file's may be.")
    if error.errno == errno.ELOOP:
        return InputError(f"{named}its symbolic links lead in a circle.")
    if isinstance(error, FileNotFoundError):
        return InputError(f"{named}there is no such file or folder.")
    if isinstance(error, IsADirectoryError):
        return InputError(f"{named}a file was expected, and this is a folder.")
    if isinstance(error, (NotADirectoryError, FileExistsError)):
        return InputError(f"{named}a folder was expected, and there is a file.")
    return None


@contextmanager
def explained_os_errors(place: str | os.PathLike[str]) -> Iterator[None]:
    """Raises the one-sentence form of an `OSError` that happens inside."""
    try:
        yield
    except OSError as error:
        explained = explain_os_error(error, place)
        if explained is None:
            raise
        raise explained from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; on success it is synced and renamed, on failure removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    with explained_os_errors(path):
        try:
            mode = usual_mode(temporary)
            yield temporary
            temporary.chmod(mode)
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def usual_mode(path: Path) -> int:
    """Creates an empty file and returns its mode, which the umask decides; some writers choose another mode."""
    path.touch()
    return path.stat().st_mode & 0o777


def is_temporary(path: Path) -> bool:
    """Returns whether a file is the leftover of an `atomic_path` that was killed."""
    return path.name.endswith(TEMPORARY)


def sync(path: Path) -> None:
    """Makes the operating system write a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """Opens a file for reading in binary; a pipe, a device or a socket is refused without waiting for it.

    Raises:
        InputError: The path is not a regular file.
        OSError: The file is missing or cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    with open(descriptor, "rb") as file:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise InputError(f"{path} is not a regular file but a pipe, a device or a socket.")
        yield file


def read_text(path: Path, limit: int = MAX_JSON_BYTES) -> str:
    """Reads a text file in UTF-8.

    Args:
        path: The file.
        limit: The largest size that is read, in bytes.

    Raises:
        InputError: The file is missing, not a regular file, larger than `limit`, or not UTF-8.
    """
    with explained_os_errors(path), open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise InputError(f"{path} has more than {limit} bytes, which is too large for a file of its kind.")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text in UTF-8: {error}.") from error


def file_sha256(path: Path) -> str:
    """Hashes a file's bytes; a file that this process has hashed is read again only if its size or time has changed."""
    with open_regular(path) as file:
        key = _state(file)
        if key in _hashes:
            return _hashes[key]
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        # a change right after the last one may leave the time as it is
        if key == _state(file) and time.time_ns() - key[-1] > _SETTLED_NS:
            _hashes[key] = digest
        return digest


def _state(file: BufferedReader) -> tuple[int, int, int, int]:
    facts = os.fstat(file.fileno())
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Returns `work` of each item, in order, computed in a few threads: hashing large files takes one core each."""
    items = list(items)
    if len(items) < 2:  # to start threads would take longer than to hash a small file
        return [work(item) for item in items]
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(work, items))


def save_json(path: Path, value: Any, indent: int = 2) -> None:
    """Writes a JSON file, indented, with a fixed order of keys.

    Raises:
        MachineError: The disk is full or permission is denied.
        ValueError: A number is NaN or infinite, which JSON cannot hold.
    """
    text = dump_json(value, indent)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def load_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        InputError: The file is missing, is not JSON, or holds JSON that `parse_json` refuses.
    """
    return parse_json(read_text(path), str(path))
