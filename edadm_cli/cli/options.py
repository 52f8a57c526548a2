"""The options that commands share: one spelling, one help text, one default each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_WHERE = "Where and how"
_OUTPUT = "Output"

RunOption = Annotated[
    Path | None,
    typer.Option(
        "--run",
        metavar="DIR",
        help="Run folder; else $EDADM_RUN, else runs/<model> or the run that was used last.",
        rich_help_panel=_WHERE,
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE.toml",
        help="Settings by name, at the top or in a table per stage; flags override them.",
        rich_help_panel=_WHERE,
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option("--seed", help="Seed of everything random; 0 when not given.", rich_help_panel=_WHERE),
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, cuda:N, or auto.", rich_help_panel=_WHERE),
]
ForceOption = Annotated[
    bool,
    typer.Option("--force", help="Build again, and replace an artifact of other settings.", rich_help_panel=_WHERE),
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Tell what is up to date, and estimate time, memory and disk of the rest; change nothing.",
        rich_help_panel=_WHERE,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.", rich_help_panel=_OUTPUT)]
QuietOption = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print one path on stdout, no progress.", rich_help_panel=_OUTPUT),
]
VerboseOption = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Tell details, and tracebacks of failures.", rich_help_panel=_OUTPUT),
]

BitsOption = Annotated[
    str | None,
    typer.Option("--bits", metavar="wXaY", help="Bit width, such as w4a8; else the run's last one."),
]
EngineOption = Annotated[
    str | None,
    typer.Option("--engine", metavar="NAME", help="What runs the denoiser (edadm engines)."),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE",
        help="default, default-attention, paper, q-diffusion, ptq4dm, rtn, or a TOML file of your own.",
    ),
]
RequireOption = Annotated[
    list[str] | None,
    typer.Option(
        "--require",
        metavar="'KEY>=NUMBER'",
        help="Exit with 5 unless it holds; a dotted key of the JSON object; repeatable.",
    ),
]
PromptsOption = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE", help="Text file, one prompt a line; else the model's own."),
]
PredictionTypeOption = Annotated[
    str | None,
    typer.Option(
        "--prediction-type", help="epsilon, v_prediction or sample: what the denoiser predicts; else as its files say."
    ),
]
NumStepsOption = Annotated[
    int | None, typer.Option("--num-steps", help="Sampler steps; else the model's own, or as collected.")
]
GuidanceScaleOption = Annotated[
    float | None,
    typer.Option("--guidance-scale", help="Classifier-free guidance; else the model's own, or as collected."),
]
BatchSizeOption = Annotated[int | None, typer.Option("--batch-size", help="Samples computed together.")]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="M", help="Known name (edadm models), diffusers folder, or hub id."),
]
NumTrajectoriesOption = Annotated[
    int | None, typer.Option("--num-trajectories", help="Trajectories sampled; else the model's own.")
]
NumImagesOption = Annotated[int | None, typer.Option("--num-images", help="Images sampled.")]
DTypeOption = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, bfloat16 or float16: arithmetic of the full-precision denoiser."),
]
