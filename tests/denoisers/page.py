"""The tables in docs/models.md, each between two marks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "models.md"


def write_table(name: str, table: str) -> None:
    """Write a table between its two marks in docs/models.md."""
    text = DOCS.read_text(encoding="utf-8")
    start, stop = _place_of(name, text)
    DOCS.write_text(text[:start] + table + text[stop:], encoding="utf-8")


def update_table(name: str, titles: Sequence[str], line: str) -> None:
    """Put one line into the table between its two marks in docs/models.md, in place of that with the same title.

    Args:
        name: The name in the marks.
        titles: The titles of the rows in the column `as in`, in their order.
        line: The line.
    """
    text = DOCS.read_text(encoding="utf-8")
    start, stop = _place_of(name, text)
    write_table(name, with_line(text[start:stop], titles, line))


def with_line(table: str, titles: Sequence[str], line: str) -> str:
    """Returns a table with one line more, or in place of that with the same title; what follows the table stays."""
    lines = table.splitlines()
    end = max(index for index, each in enumerate(lines) if each.startswith("|")) + 1
    column = lines[0].split(" | ").index("as in")
    by_title = {each.split(" | ")[column]: each for each in [*lines[2:end], line]}
    ordered = [by_title[title] for title in titles if title in by_title]
    return "\n".join([*lines[:2], *ordered, *lines[end:]]) + "\n"


def _place_of(name: str, text: str) -> tuple[int, int]:
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    return text.index(begin) + len(begin), text.index(end)
