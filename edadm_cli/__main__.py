"""The program `edadm`, also as `python -m edadm_cli`: the form that `torchrun -m` and `accelerate launch -m` start."""

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


if __name__ == "__main__":
    sys.exit(main())
