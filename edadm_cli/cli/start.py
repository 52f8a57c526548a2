"""Starts the program `edadm`."""

from __future__ import annotations

import sys

from edadm_cli.errors import EXIT_INTERRUPTED


def main() -> int:
    """Runs the command line; returns the exit code.

    The command line is imported here, so that Ctrl-C during the import ends the program without a stack trace.
    """
    try:
        from edadm_cli.cli.app import main as run
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED
    return run()
