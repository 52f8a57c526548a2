"""Write docs/cli.md from the program's own `--help`, or check that it is current with `--check`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).with_name("cli.md")
COMMANDS = (
    "run",
    "collect",
    "select",
    "sensitivity",
    "reconstruct",
    "export",
    "bench",
    "evaluate",
    "report",
    "sample",
    "push",
    "inspect",
    "models",
    "engines",
)
HEAD = """# Commands

This page is `edadm --help` and the help of each command, written by `python docs/cli_reference.py`;
`make docs` checks that it is current. Run folders and the JSON objects: [artifacts.md](artifacts.md).
"""


def help_text(*words: str) -> str:
    """What a command prints with `--help`, without boxes and colours."""
    script = "import sys; from edadm_cli.cli.app import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "TYPER_USE_RICH": "0", "COLUMNS": "100", "NO_COLOR": "1"}
    command = [sys.executable, "-c", script, *words, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def page() -> str:
    """The whole page."""
    parts = [HEAD, f"```\n{help_text()}\n```\n"]
    parts += [f"## edadm {command}\n\n```\n{help_text(command)}\n```\n" for command in COMMANDS]
    return "\n".join(parts)


def main() -> int:
    """Write the page, or with `--check` compare it; the exit code is 1 when it is not current."""
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print(f"{PAGE} is not current: run `python docs/cli_reference.py`.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
