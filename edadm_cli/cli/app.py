"""The program `edadm`: the list of its commands, each of which is imported when it is called."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup

from edadm_cli.cli.boundary import guard
from edadm_cli.cli.signals import handled_signals
from edadm_cli.cli.streams import forgiving_streams
from edadm_cli.version import __version__

_CHAIN = "The chain, stage by stage"
_WHOLE = "The chain at once"
_SHOW = "Use and inspect"
_CONTEXT = {"help_option_names": ["-h", "--help"]}
_NARROWEST_PANEL = 60  # columns of a narrower terminal cut the names of options in panels short
_MARKUP: Literal["rich"] | None = "rich" if shutil.get_terminal_size().columns >= _NARROWEST_PANEL else None


def _examples(lines: Sequence[str]) -> str:
    """Returns command lines as a paragraph of help; the backspace in front keeps its lines from being joined."""
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in lines)))


class _SwitchesWithoutType:
    """Shows no type behind the switches that Typer adds, such as `--help`: they take no value."""

    def get_params(self, ctx: Any) -> list[Any]:
        parameters: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for parameter in parameters:
            if getattr(parameter, "is_flag", False) and parameter.metavar is None:
                parameter.metavar = ""
        return parameters


class _LoadedCommand(_SwitchesWithoutType, TyperCommand):
    """A command once its module is imported."""


@dataclass(frozen=True)
class Command:
    """A command as `edadm --help` lists it; the module `edadm_cli.cli.<module>` has a function of the same name.

    The help of the command ends with `examples`, which are whole command lines.
    """

    name: str
    module: str
    panel: str
    help: str
    examples: tuple[str, ...]

    def load(self) -> Any:
        """Imports the command and returns it with its options."""
        function = getattr(importlib.import_module(f"edadm_cli.cli.{self.module}"), self.name)
        single = typer.Typer(
            add_completion=False,
            pretty_exceptions_enable=False,
            context_settings=_CONTEXT,
            rich_markup_mode=_MARKUP,
        )
        single.command(self.name, cls=_LoadedCommand, help=self.help, epilog=_examples(self.examples))(function)
        return typer.main.get_command(single)


COMMANDS = {
    command.name: command
    for command in (
        Command(
            "run",
            "chain",
            _WHOLE,
            "Run the whole chain.\n\nIt collects, selects, reconstructs, exports, evaluates and reports. Stages that"
            " are up to date are skipped.",
            (
                "edadm run --model digits-sd --bits w8a8,w4a8",
                "edadm run --model sdxl --bits w8a8 --recipe quick --dtype float16",
                "edadm run --model digits-sd --bits w4a8 --dry-run",
            ),
        ),
        Command(
            "collect",
            "stages",
            _CHAIN,
            "Sample at full precision and record the trajectories.\n\nThe conditioning and the features of the"
            " denoiser's middle block are recorded too.",
            (
                "edadm collect --model digits-sd",
                "edadm collect --model sdxl --num-trajectories 64 --dtype float16",
            ),
        ),
        Command(
            "select",
            "stages",
            _CHAIN,
            "Choose the calibration samples.\n\nTDAC, or another strategy, decides how many of them come from each"
            " sampler step.",
            ("edadm select", "edadm select --strategy uniform --num-samples 128"),
        ),
        Command(
            "sensitivity",
            "stages",
            _CHAIN,
            "Measure the error of each layer at each number of bits.\n\nAfterwards, reconstruct --bits auto:4.5a8"
            " assigns an average of 4.5 bits per weight to the layers so that the error is smallest, and --bits"
            " auto:1.8MiB does so within a size of the denoiser.",
            (
                "edadm sensitivity",
                "edadm sensitivity --weight-bits 3,4,8 --num-samples 32",
                "edadm sensitivity --group-size 32",
            ),
        ),
        Command(
            "reconstruct",
            "stages",
            _CHAIN,
            "Find the quantization parameters.\n\nThe ranges are searched first; then rounding and scales are learned,"
            " block by block.",
            (
                "edadm reconstruct --bits w4a8",
                "edadm reconstruct --bits w4a8 --recipe thorough",
                "edadm reconstruct --bits auto:4.5a8",
            ),
        ),
        Command(
            "export",
            "stages",
            _CHAIN,
            "Pack the integers into a diffusers folder.\n\nThe folder is loaded again and compared with the"
            " reconstruction.",
            (
                "edadm export",
                "edadm export --bits w4a8 --engine openvino",
                "edadm export --lora style.safetensors:0.8 --force",
            ),
        ),
        Command(
            "bench",
            "stages",
            _CHAIN,
            "Measure speed, memory and size against full precision.\n\nEvery layer is first compared with exact"
            " integers; an engine that does not match is not timed.",
            (
                "edadm bench",
                "edadm bench --model sd15-random --bits w8a8,w4a8 --against nncf",
                "edadm bench --require 'speedup.vs_best_float>=1.2'",
            ),
        ),
        Command(
            "evaluate",
            "stages",
            _CHAIN,
            "Measure an export's quality.\n\nIts images are compared with real images, and one by one with the"
            " full-precision images of the same seeds.",
            (
                "edadm evaluate --num-images 1000",
                "edadm evaluate --bits w4a8 --require 'prompt_accuracy>=0.99'",
                "edadm evaluate --engine openvino",
            ),
        ),
        Command(
            "report",
            "views",
            _SHOW,
            "Write report.html, one page that shows a run.\n\nIt holds the metrics, plots and images, and links to"
            " nothing outside itself.",
            ("edadm report", "edadm report --bits w4a8"),
        ),
        Command(
            "sample",
            "stages",
            _SHOW,
            "Sample images from an export.\n\nThey are PNG files in the folder samples of the run.",
            (
                "edadm sample --prompt 'a handwritten seven'",
                "edadm sample --num-images 4 --engine openvino",
            ),
        ),
        Command(
            "push",
            "push",
            _SHOW,
            "Upload an export to the Hugging Face hub.\n\nIts model card has the metrics and the image grid of its"
            " evaluation, and no information about this machine.",
            (
                "edadm push runs/digits-sd/export/w4a8 OWNER/NAME --dry-run",
                "edadm push runs/digits-sd/export/w4a8 OWNER/NAME --private",
            ),
        ),
        Command(
            "inspect",
            "views",
            _SHOW,
            "Show and check an artifact or a run.\n\nIt shows the content and the lineage, and checks that every file"
            " is unchanged.",
            ("edadm inspect", "edadm inspect runs/digits-sd/export/w4a8"),
        ),
        Command(
            "models",
            "views",
            _SHOW,
            "List the known models.\n\nIt shows what each is, where its weights come from, and whether they are"
            " available offline. Most models also exist with random weights, as NAME-random.",
            ("edadm models", "edadm models --json"),
        ),
        Command(
            "engines",
            "views",
            _SHOW,
            "List the engines.\n\nIt shows what each can do on this machine, or why it cannot run here.",
            ("edadm engines", "edadm engines --json"),
        ),
    )
}


class _LazyGroup(_SwitchesWithoutType, TyperGroup):
    """Lists commands by their descriptions, and imports only the one that is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, listed, rest = super().resolve_command(ctx, args)
        return name, COMMANDS[name].load() if name in COMMANDS else listed, rest


app = typer.Typer(
    name="edadm",
    cls=_LazyGroup,
    help="Quantize a diffusion model after training, and measure what is gained and lost.",
    epilog="Start with: edadm run --model digits-sd --bits w4a8. The help of each command has examples.",
    pretty_exceptions_enable=False,
    context_settings=_CONTEXT,
    rich_markup_mode=_MARKUP,
)
for _command in COMMANDS.values():
    app.command(_command.name, rich_help_panel=_command.panel, help=_command.help)(lambda: None)


def _print_version(is_given: bool) -> None:
    if is_given:
        print(f"edadm {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, metavar="", help="Print the version and exit."
        ),
    ] = False,
) -> None:
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code; without `arguments`, those of the process, which then ends."""
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    with handled_signals(is_program=arguments is None) as signals, forgiving_streams():
        try:
            return guard(words, lambda: app(args=words, prog_name="edadm", standalone_mode=False), signals)
        except KeyboardInterrupt:  # while a failure was being reported
            return signals.explain().exit_code
