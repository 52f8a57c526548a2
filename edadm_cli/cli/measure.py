"""The commands about speed: bench and engines."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from edadm_cli.cli import options
from edadm_cli.cli.execution import Execution, output_command, stage_command
from edadm_cli.cli.require import parse_requirements
from edadm_cli.errors import UsageError

_SIZE = re.compile(r"^(\d+)(?:x(\d+))?$")


@stage_command
def bench(
    execution: Execution,
    bits: Annotated[
        list[str] | None,
        typer.Option("--bits", metavar="wXaY", help="Bit widths, repeatable or with commas; else the run's last one."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="M", help="Measure a model without a run, its weights rounded to nearest."),
    ] = None,
    engine: options.EngineOption = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="float32, bfloat16 or float16: element type of what is not quantized."),
    ] = None,
    recipe: options.RecipeOption = None,
    batch_sizes: Annotated[
        list[str] | None,
        typer.Option("--batch-sizes", metavar="1,2,...", help="Rows of a call; latency is that of the first."),
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", metavar="N|HxW", help="Size of the latents; else the model's own.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads; else one a physical core.")] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", help="Turns of each contender.")] = None,
    against: Annotated[
        list[str] | None,
        typer.Option("--against", metavar="PEER", help="nncf or torchao, where installed; repeatable or with commas."),
    ] = None,
    compiled: Annotated[
        bool | None, typer.Option("--compiled/--no-compiled", help="Whether torch.compile is a contender.")
    ] = None,
    autotune: Annotated[
        bool | None,
        typer.Option("--autotune", help="Have torch.compile time kernels for every product: minutes more."),
    ] = None,
    pipeline: Annotated[
        bool | None, typer.Option("--pipeline", help="Time whole images too, with the model's own steps.")
    ] = None,
    roofline: Annotated[
        bool,
        typer.Option("--roofline", help="Measure nothing: print the time that no kernel can beat, for some GPUs."),
    ] = False,
    require: options.RequireOption = None,
) -> None:
    """Measure speed, memory and size against full precision.

    Every layer is first compared with exact integers; nothing is timed that does not match.
    """
    from edadm_cli.cli.places import run_of_model
    from edadm_cli.cli.settings import bits_of, parse_bits
    from edadm_cli.config import BenchConfig

    requirements = parse_requirements(require)
    if roofline:
        _print_rooflines(execution, model, _numbers("--batch-sizes", batch_sizes) or (2,))
        return
    widths = parse_bits(bits or _texts(execution.from_file("bench", "bits")))
    model = model or execution.from_file("bench", "model")
    run = execution.run_used_last() if model is None else run_of_model(execution.run_folder, model)
    if not widths:
        widths = parse_bits(["w8a8"]) if model is not None else [bits_of(execution, None, "export")]
    config = execution.configure(
        BenchConfig,
        bits=tuple(widths),
        model=model,
        engine=engine,
        dtype=dtype,
        recipe=recipe,
        batch_sizes=_numbers("--batch-sizes", batch_sizes),
        size=_size(size),
        threads=threads,
        rounds=rounds,
        against=tuple(name for text in against for name in text.split(",")) if against else None,
        compiled=compiled,
        autotune=autotune,
        pipeline=pipeline,
    )

    from edadm_cli.bench import stage

    record = execution.perform(
        "bench", run, None, stage.run, stage.estimate, config, finished=stage.finished, always_anew=True
    )
    execution.conclude(record, requirements=requirements)


@output_command
def engines(execution: Execution) -> None:
    """List the engines.

    What each can do on this machine, and why it is refused where it is.
    """
    from edadm_cli.engines.registry import engine_facts

    facts = [found.model_dump(mode="json") for found in engine_facts()]
    execution.print_facts({"engines": facts}, "\n".join(row["name"] for row in facts))


def _print_rooflines(execution: Execution, model: str | None, batch_sizes: tuple[int, ...]) -> None:
    if model is None:
        raise UsageError("--roofline needs --model.", hint="edadm bench --roofline --model sd15-random")

    from edadm_cli.bench.roofline import model_rooflines

    tables = {str(batch): model_rooflines(model, batch).to_json() for batch in batch_sizes}
    execution.print_facts({"model": model, "rooflines": tables}, None)


def _texts(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)] if value else []


def _numbers(flag: str, texts: list[str] | None) -> tuple[int, ...] | None:
    if not texts:
        return None
    parts = [part.strip() for text in texts for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise UsageError(f"{flag} takes whole numbers with commas, such as 1,2,4; got '{','.join(parts)}'.")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = _SIZE.match(text.strip())
    if match is None:
        raise UsageError(f"--size takes a number or HxW, such as 64 or 64x96; got '{text}'.")
    return int(match[1]), int(match[2] or match[1])
