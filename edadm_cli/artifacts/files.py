"""Files that are either whole or absent: written beside their place, synced, and renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edadm_cli.errors import EdadmError, InputError, MachineError

_MACHINE_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission is denied",
    errno.EPERM: "the operation is not permitted",
    errno.EROFS: "the file system is read-only",
    errno.EMFILE: "too many files are open",
    errno.EIO: "the disk reports an input/output error",
    errno.ENOMEM: "memory is used up",
}
TEMPORARY = ".edadm-tmp"


def explain_os_error(error: OSError, place: str | os.PathLike[str] | None = None) -> EdadmError | None:
    """Turn an operating-system error that the user can mend into one sentence; `None` for any other."""
    where = place if place is not None else error.filename
    named = f"{where}: " if where is not None else ""
    if error.errno in _MACHINE_REASONS:
        hint = (
            "free some space, or use another folder with --run" if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
        )
        return MachineError(f"{named}{_MACHINE_REASONS[error.errno]}.", hint=hint)
    if isinstance(error, FileNotFoundError):
        return InputError(f"{named}there is no such file or folder.")
    if isinstance(error, IsADirectoryError):
        return InputError(f"{named}a file is wanted, and this is a folder.")
    if isinstance(error, (NotADirectoryError, FileExistsError)):
        return InputError(f"{named}a folder is wanted, and there is a file.")
    return None


@contextmanager
def explained_os_errors(place: str | os.PathLike[str]) -> Iterator[None]:
    """Raise the one-sentence form of an `OSError` that happens inside."""
    try:
        yield
    except OSError as error:
        explained = explain_os_error(error, place)
        if explained is None:
            raise
        raise explained from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path in the same folder; on success it is synced and renamed, on failure removed."""
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
    """Create an empty file and give its mode, which the umask decides; some writers choose their own."""
    path.touch()
    return path.stat().st_mode & 0o777


def is_temporary(path: Path) -> bool:
    """Whether a file is the leftover of an `atomic_path` that was killed."""
    return path.name.endswith(TEMPORARY)


def sync(path: Path) -> None:
    """Have the operating system write a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Hash a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_json(path: Path, value: Any, indent: int = 2) -> None:
    """Write a JSON file, indented, with a fixed order of keys.

    Raises:
        MachineError: The disk is full or permission is denied.
        ValueError: A number is NaN or infinite, which JSON cannot hold.
    """
    text = json.dumps(value, indent=indent, sort_keys=True, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def load_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: The file is missing or holds no JSON.
    """
    with explained_os_errors(path):
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{path} is not readable JSON: {error}.") from error
