"""The program `edadm`."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from edadm_cli.cli import chain, look, measure, quality, stages
from edadm_cli.cli.boundary import guard
from edadm_cli.version import __version__

_CHAIN = "The chain, stage by stage"
_WHOLE = "The chain at once"
_LOOK = "Looking"

app = typer.Typer(
    name="edadm",
    help="Quantize a diffusion model after training, with the proof that it still draws.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(rich_help_panel=_WHOLE)(chain.run)
app.command(rich_help_panel=_CHAIN)(stages.collect)
app.command(rich_help_panel=_CHAIN)(stages.select)
app.command(rich_help_panel=_CHAIN)(stages.reconstruct)
app.command(rich_help_panel=_CHAIN)(stages.export)
app.command(rich_help_panel=_CHAIN)(measure.bench)
app.command(rich_help_panel=_CHAIN)(quality.evaluate)
app.command(rich_help_panel=_LOOK)(quality.report)
app.command(rich_help_panel=_LOOK)(quality.sample)
app.command(rich_help_panel=_LOOK)(look.inspect)
app.command(rich_help_panel=_LOOK)(look.models)
app.command(rich_help_panel=_LOOK)(measure.engines)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"edadm {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and give its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return guard(words, lambda: app(args=words, prog_name="edadm", standalone_mode=False))
