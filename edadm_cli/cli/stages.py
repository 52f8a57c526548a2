"""The commands of the chain: collect, select, reconstruct, export."""

from __future__ import annotations

from typing import Annotated

import typer

from edadm_cli.cli import options
from edadm_cli.cli.execution import Execution, stage_command


@stage_command
def collect(
    execution: Execution,
    model: options.ModelOption = None,
    num_trajectories: options.NumTrajectoriesOption = None,
    num_steps: options.NumStepsOption = None,
    guidance_scale: options.GuidanceScaleOption = None,
    batch_size: options.BatchSizeOption = None,
    feature_batch: Annotated[
        int | None, typer.Option("--feature-batch", help="Trajectories whose mid-block features are kept.")
    ] = None,
    dtype: options.DTypeOption = None,
    prompts: options.PromptsOption = None,
    prediction_type: options.PredictionTypeOption = None,
) -> None:
    """Sample at full precision and record the trajectories.

    With them the conditioning and the features of the denoiser's middle block.
    """
    from edadm_cli.cli.places import run_of_model
    from edadm_cli.config import CollectConfig

    config = execution.configure(
        CollectConfig,
        model=model,
        num_trajectories=num_trajectories,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
        feature_batch=feature_batch,
        dtype=dtype,
        prompts=prompts,
        prediction_type=prediction_type,
    )
    run = run_of_model(execution.run_folder, config.model)

    from edadm_cli.collect import stage

    execution.conclude(execution.perform("collect", run, None, stage.run, stage.estimate, config, stage.plan))


@stage_command
def select(
    execution: Execution,
    strategy: Annotated[
        str | None,
        typer.Option("--strategy", help="tdac, uniform, normal, random or last; else the recipe's."),
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option("--num-samples", help="Size of the set; else one sample a trajectory.")
    ] = None,
    density_radius: Annotated[
        float | None, typer.Option("--density-radius", help="r of TDAC; else the median pairwise distance.")
    ] = None,
    variety_weight: Annotated[
        float | None, typer.Option("--variety-weight", help="lambda of TDAC; else the model's own.")
    ] = None,
    recipe: options.RecipeOption = None,
) -> None:
    """Choose the calibration samples.

    TDAC, or another strategy, says how many of them each step of the sampler gives.
    """
    from edadm_cli.cli.settings import configure_select

    config = configure_select(
        execution,
        recipe,
        strategy=strategy,
        num_samples=num_samples,
        density_radius=density_radius,
        variety_weight=variety_weight,
    )
    run = execution.run_used_last()

    from edadm_cli.select import stage

    execution.conclude(execution.perform("select", run, None, stage.run, stage.estimate, config, stage.plan))


@stage_command
def reconstruct(
    execution: Execution,
    bits: Annotated[
        str | None, typer.Option("--bits", metavar="wXaY", help="Bit width, 2 to 8 each, such as w4a8.")
    ] = None,
    recipe: options.RecipeOption = None,
    batch_size: options.BatchSizeOption = None,
    units: Annotated[
        list[str] | None,
        typer.Option(
            "--units", metavar="PATTERN", help="Units that learn, such as 'mid_block.*'; repeatable; else all."
        ),
    ] = None,
    matmul: Annotated[
        str | None, typer.Option("--matmul", help="float32 or tf32: how a GPU multiplies float32 numbers.")
    ] = None,
    memory_budget_mib: Annotated[
        int | None,
        typer.Option(
            "--memory-budget",
            "--memory-budget-mib",
            metavar="MIB",
            help="Memory for cached inputs and targets of the units; what is beyond goes to disk.",
        ),
    ] = None,
) -> None:
    """Find the quantization parameters.

    First a search for the ranges, then learned rounding and scales, block by block.
    """
    from edadm_cli.cli.settings import configure_reconstruct

    config = configure_reconstruct(
        execution,
        recipe,
        bits,
        batch_size=batch_size,
        units=tuple(units) if units else None,
        matmul=matmul,
        memory_budget_mib=memory_budget_mib,
    )
    run = execution.run_used_last()

    from edadm_cli.reconstruct import stage

    name = str(config.bits)
    execution.conclude(execution.perform("reconstruct", run, name, stage.run, stage.estimate, config, stage.plan))


@stage_command
def export(
    execution: Execution,
    bits: options.BitsOption = None,
    parity_samples: Annotated[
        int | None, typer.Option("--parity-samples", help="Images compared before and after packing.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option("--engine", metavar="NAME", help="Write files that this engine loads besides (edadm engines)."),
    ] = None,
) -> None:
    """Pack the integers into a diffusers folder.

    It is loaded back and compared with the stage before.
    """
    from edadm_cli.cli.settings import bits_of
    from edadm_cli.config import ExportConfig

    run = execution.run_used_last()
    config = execution.configure(
        ExportConfig, bits=bits_of(execution, bits, "reconstruct"), parity_samples=parity_samples, engine=engine
    )

    from edadm_cli.export import stage

    name = str(config.bits)
    plan = stage.plan if config.engine is None else None  # an engine's files are an artifact besides
    execution.conclude(execution.perform("export", run, name, stage.run, stage.estimate, config, plan))
