"""Makes text of files, libraries and users safe for a terminal."""

from __future__ import annotations

LONGEST_WORD = 400
LONGEST_LINE = 3000


def one_line(text: str) -> str:
    """Returns a text as one line without any effect on the terminal.

    Control characters, colour codes, marks that reverse the direction of writing and halves of surrogate pairs become
    escapes. Words and lines that are too long to read lose their middle.
    """
    words = (shortened(word, LONGEST_WORD) for word in text[: 100 * LONGEST_LINE].split())
    joined = shortened(" ".join(words), LONGEST_LINE)
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in joined)


def shortened(text: str, length: int) -> str:
    """Returns a text, without its middle if it is longer than `length` characters."""
    if len(text) <= length:
        return text
    half = (length - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"
