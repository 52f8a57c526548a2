"""Replaces the tables of a page with what the programs that they name print now.

    python benchmarks/fill_tables.py docs/results*.md docs/ingredients.md docs/scale.md README.md

A table is everything between a line `<!-- table: learner_table.py docs/data/learner.jsonl --groups ships -->`, which
names a program in benchmarks/ and its arguments, and the next line `<!-- end of table -->`.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
TABLE = re.compile(r"(?P<head><!-- table: (?P<command>[^\n]+) -->\n).*?(?P<foot><!-- end of table -->)", re.DOTALL)


def printed(command: str) -> str:
    """Returns the output of a program in benchmarks/, with headings of a level that fits into a page."""
    program, *arguments = shlex.split(command)
    result = subprocess.run(
        [sys.executable, str(FOLDER / program), *arguments],
        cwd=FOLDER.parent,
        check=True,
        capture_output=True,
        text=True,
    )
    return re.sub(r"^### ", "#### ", result.stdout.strip(), flags=re.MULTILINE)


def filled(text: str) -> str:
    """Returns a page with its tables printed anew."""
    return TABLE.sub(lambda match: f"{match['head']}\n{printed(match['command'])}\n\n{match['foot']}", text)


def main() -> None:
    """Fills the pages that the command line names."""
    for path in map(Path, sys.argv[1:]):
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
