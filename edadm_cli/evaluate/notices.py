"""Warns of what an evaluation does not measure, and of what its metrics do not mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from edadm_cli.progress import Reporter


def warn_of_limits(skipped: Mapping[str, str], cautions: Iterable[str], reporter: Reporter) -> None:
    """Warns of the metrics that are left out, once per reason, and of those with a limited meaning."""
    for reason in sorted(set(skipped.values())):
        names = ", ".join(sorted(name for name, why in skipped.items() if why == reason))
        reporter.warn(f"Without {names}: {reason}")
    for caution in cautions:
        reporter.warn(caution)
