"""Keeps errors of standard output and standard error from making finished work fail.

Their readers may go away, the streams may be closed, and the disk of standard error may be full. The work continues,
and the exit code is that of the work. A full disk behind standard output is a failure, because the result is lost.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

_ESCAPES = "edadm.file-name-or-escape"
_GONE = (errno.EPIPE, errno.EBADF)


class _Forgiving:
    """A text stream that discards its text once writing has failed with an error that `forgives` accepts."""

    def __init__(self, stream: TextIO, forgives: Callable[[Exception], bool]) -> None:
        self._stream = stream
        self._forgives = forgives

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            if not self._forgives(error):
                raise
            redirect_to_null(self._stream)


def redirect_to_null(stream: TextIO) -> None:
    """Redirects the stream's descriptor to the null device, including the text that is still in its buffer."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


@contextmanager
def forgiving_streams() -> Iterator[None]:
    """Replaces `sys.stdout` and `sys.stderr` while entered, and flushes them at the end without failing."""
    open_missing_descriptors()
    out, error = _text_stream(sys.stdout), _text_stream(sys.stderr)
    forgiving_out = _Forgiving(out, lambda problem: isinstance(problem, ValueError) or _is_gone(problem))
    forgiving_error = _Forgiving(error, lambda problem: True)
    with (
        contextlib.redirect_stdout(cast(TextIO, forgiving_out)),
        contextlib.redirect_stderr(cast(TextIO, forgiving_error)),
    ):
        try:
            yield
        finally:
            for stream in (out, error):
                try:
                    stream.flush()
                except (OSError, ValueError):
                    redirect_to_null(stream)


def open_missing_descriptors() -> None:
    """Opens the null device for standard streams that are closed, so that no file gets their descriptors."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(
                os.open(os.devnull, os.O_RDWR), True
            )  # open() takes the lowest free number, which is this one


def _text_stream(stream: TextIO | None) -> TextIO:
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    if isinstance(stream, io.TextIOWrapper) and stream.errors != _ESCAPES:
        with contextlib.suppress(OSError, ValueError):
            stream.reconfigure(errors=_ESCAPES)
    return stream


def _file_name_or_escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """Returns the bytes of file names that are not UTF-8, so that a script can use them, and escapes of all else."""
    assert isinstance(error, UnicodeEncodeError)
    if all("\udc80" <= character <= "\udcff" for character in error.object[error.start : error.end]):
        return codecs.lookup_error("surrogateescape")(error)
    return codecs.backslashreplace_errors(error)


codecs.register_error(_ESCAPES, _file_name_or_escape)


def _is_gone(problem: Exception) -> bool:
    return isinstance(problem, OSError) and problem.errno in _GONE
