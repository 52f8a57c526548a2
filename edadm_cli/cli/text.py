"""Text of files, libraries and users on its way to a terminal."""

from __future__ import annotations


def one_line(text: str) -> str:
    """Returns a text on one line with its control characters written out, so that it cannot steer a terminal."""
    joined = " ".join(text.split())
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in joined)
