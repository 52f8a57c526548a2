"""The notices of the page about missing stages and warnings."""

from __future__ import annotations

from edadm_cli.report.commands import missing_command
from edadm_cli.report.contents import RunContents
from edadm_cli.report.html import Html, code, element

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


def caution(text: str) -> Html:
    """Returns a notice with the warning of a stage."""
    return element("p", text, class_="caution")
