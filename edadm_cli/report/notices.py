"""The notices of the page about missing stages and warnings."""

from __future__ import annotations

from collections.abc import Callable

from edadm_cli.report.commands import missing_command
from edadm_cli.report.contents import RunContents, Width
from edadm_cli.report.html import Html, Node, code, element

_MISSING = {
    "collect": "The full-precision trajectories are not in this run.",
    "select": "No calibration set has been selected.",
    "reconstruct": "There are no quantization parameters yet.",
    "export": "No quantized pipeline has been exported.",
    "evaluate": "The images have not been evaluated.",
}


def missing(contents: RunContents, kind: str, bits: str | None = None) -> Html:
    """Returns a notice that a stage was not run, with the command that runs it."""
    command = code(missing_command(contents, kind, bits))
    return element("p", _MISSING[kind], " Next: ", command, class_="missing")


def per_width(contents: RunContents, kind: str, show: Callable[[Width], Html | None]) -> list[Node]:
    """Returns what `show` gives for each bit width, below a heading if there are several bit widths.

    Args:
        contents: The contents of the run.
        kind: The stage whose results are shown.
        show: Returns the results of one bit width; `None` if the stage was not run, which gives a notice.
    """
    if not contents.widths:
        return [missing(contents, kind)]
    nodes: list[Node] = []
    for width in contents.widths:
        heading = element("h3", width.title) if len(contents.widths) > 1 else None
        nodes += [heading, show(width) or missing(contents, kind, width.bits)]
    return nodes


def caution(text: str) -> Html:
    """Returns a notice with the warning of a stage."""
    return element("p", text, class_="caution")
