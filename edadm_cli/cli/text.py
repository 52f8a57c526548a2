"""Text of files, libraries and users on its way to a terminal."""

from __future__ import annotations

LONGEST_WORD = 400
LONGEST_LINE = 3000


def one_line(text: str) -> str:
    """Returns a text on one line that cannot steer a terminal.

    Control characters, colour codes, marks that reverse the direction of writing and halves of surrogate pairs are
    written out as escapes. Words and lines beyond a length that anyone reads lose their middle.
    """
    words = (shortened(word, LONGEST_WORD) for word in text[: 100 * LONGEST_LINE].split())
    joined = shortened(" ".join(words), LONGEST_LINE)
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in joined)


def shortened(text: str, length: int) -> str:
    """Returns a text without its middle where it is longer than `length` characters."""
    if len(text) <= length:
        return text
    half = (length - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"
