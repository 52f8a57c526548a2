"""The commands that look at an export: evaluate, sample, report."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from edadm_cli.cli import options
from edadm_cli.cli.execution import Execution, place_command, stage_command
from edadm_cli.cli.require import parse_requirements


@stage_command
def evaluate(
    execution: Execution,
    bits: options.BitsOption = None,
    engine: options.EngineOption = None,
    num_images: options.NumImagesOption = None,
    batch_size: options.BatchSizeOption = None,
    num_steps: options.NumStepsOption = None,
    guidance_scale: options.GuidanceScaleOption = None,
    prompts: options.PromptsOption = None,
    real: Annotated[
        str | None,
        typer.Option(
            "--real",
            metavar="PATH|NAME",
            help="Folder of real images, npz of their statistics, or a dataset of torch-fidelity, as cifar10-train.",
        ),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option("--metrics", metavar="NAME", help="Figures, repeatable or with commas; else all."),
    ] = None,
    clip_model: Annotated[str | None, typer.Option("--clip-model", help="open_clip model of the CLIP score.")] = None,
    clip_pretrained: Annotated[
        str | None, typer.Option("--clip-pretrained", metavar="TAG|FILE", help="Its weights.")
    ] = None,
    inception_weights: Annotated[
        Path | None, typer.Option("--inception-weights", metavar="FILE", help="Weights of Inception.")
    ] = None,
    require: options.RequireOption = None,
) -> None:
    """Measure an export's quality.

    Against real images, and image by image against full precision with the same seeds.
    """
    from edadm_cli.cli.settings import bits_of
    from edadm_cli.config import EvaluateConfig

    requirements = parse_requirements(require)
    run = execution.run_used_last()
    config = execution.configure(
        EvaluateConfig,
        bits=bits_of(execution, bits, "export"),
        engine=engine,
        num_images=num_images,
        batch_size=batch_size,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        prompts=prompts,
        real=real,
        metrics=tuple(name for text in metrics for name in text.split(",")) if metrics else None,
        clip_model=clip_model,
        clip_pretrained=clip_pretrained,
        inception_weights=inception_weights,
    )

    from edadm_cli.evaluate import stage

    record = execution.perform("evaluate", run, str(config.bits), stage.run, stage.estimate, config, stage.plan)
    execution.conclude(record, requirements=requirements)


@stage_command
def sample(
    execution: Execution,
    bits: options.BitsOption = None,
    engine: options.EngineOption = None,
    num_images: options.NumImagesOption = None,
    batch_size: options.BatchSizeOption = None,
    num_steps: options.NumStepsOption = None,
    guidance_scale: options.GuidanceScaleOption = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="What to show; repeatable; else the model's own.")
    ] = None,
    arithmetic: Annotated[
        str | None,
        typer.Option("--arithmetic", help="fake-quantize (floating point) or integer (int8 products)."),
    ] = None,
) -> None:
    """Sample images from an export."""
    from edadm_cli.cli.settings import bits_of
    from edadm_cli.config import SampleConfig

    run = execution.run_used_last()
    config = execution.configure(
        SampleConfig,
        bits=bits_of(execution, bits, "export"),
        engine=engine,
        num_images=num_images,
        batch_size=batch_size,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        prompt=tuple(prompt) if prompt else None,
        arithmetic=arithmetic,
    )

    from edadm_cli.sample import stage

    name = str(config.bits)
    place = run.root / stage.FOLDER / name
    record = execution.perform(
        "sample", run, name, stage.run, stage.estimate, config, place=place, finished=stage.finished
    )
    execution.conclude(record)


@place_command
def report(
    execution: Execution,
    bits: Annotated[
        list[str] | None,
        typer.Option("--bits", metavar="wXaY", help="Bit widths to show, repeatable or with commas; else all."),
    ] = None,
) -> None:
    """Write report.html, one page that shows a run.

    It holds the figures, plots and images, and links to nothing outside itself.
    """
    from edadm_cli.artifacts import ReportRecord, spent
    from edadm_cli.cli.settings import parse_bits

    started = time.monotonic()
    names = [str(width) for width in parse_bits(bits)] or None
    run = execution.run_used_last()

    from edadm_cli.report import stage

    with contextlib.redirect_stdout(sys.stderr):
        page = stage.run(run, names)
    record = ReportRecord(status="done", run=str(run.root), report=str(page), **spent(started))
    execution.conclude(record, path=str(page))
