"""The commands of the stages: each configures a stage, runs or plans it, and prints its record."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from edadm_cli import bench as bench_package
from edadm_cli import collect as collect_package
from edadm_cli import evaluate as evaluate_package
from edadm_cli import export as export_package
from edadm_cli import reconstruct as reconstruct_package
from edadm_cli import sample as sample_package
from edadm_cli import select as select_package
from edadm_cli import sensitivity as sensitivity_package
from edadm_cli.artifacts import RunFolder, Stage
from edadm_cli.cli import flags
from edadm_cli.cli.current_run import bits_used_last
from edadm_cli.cli.execution import ConfigT, Execution, stage_command
from edadm_cli.cli.require import Requirement, parse_requirements
from edadm_cli.cli.settings import recipe_name
from edadm_cli.config import BitWidth, CollectConfig, ReconstructConfig, SelectConfig
from edadm_cli.errors import UsageError
from edadm_cli.recipe import load_recipe

COLLECT = collect_package.STAGE
SELECT = select_package.STAGE
SENSITIVITY = sensitivity_package.STAGE
RECONSTRUCT = reconstruct_package.STAGE
EXPORT = export_package.STAGE
EVALUATE = evaluate_package.STAGE
SAMPLE = sample_package.STAGE
BENCH = bench_package.STAGE


@stage_command(COLLECT.config)
def collect(execution: Execution, given: dict[str, Any]) -> None:
    """Samples at full precision and records the trajectories."""
    config = execution.configure(COLLECT, given)
    execution.conclude(execution.perform(COLLECT, execution.run_of_model(config.model), config))


@stage_command(SELECT.config, flags.RECIPE)
def select(execution: Execution, given: dict[str, Any]) -> None:
    """Chooses the calibration samples."""
    config = configure_select(execution, given)
    execution.conclude(execution.perform(SELECT, execution.run_used_last(), config))


@stage_command(SENSITIVITY.config)
def sensitivity(execution: Execution, given: dict[str, Any]) -> None:
    """Measures what each layer costs at each number of bits."""
    recipe = given["recipe"] or execution.from_file("sensitivity", "recipe") or "default"
    config = execution.configure(SENSITIVITY, {**given, "recipe": recipe})
    execution.conclude(execution.perform(SENSITIVITY, execution.run_used_last(), config))


@stage_command(RECONSTRUCT.config)
def reconstruct(execution: Execution, given: dict[str, Any]) -> None:
    """Finds the quantization parameters."""
    config = configure_reconstruct(execution, given)
    execution.conclude(execution.perform(RECONSTRUCT, execution.run_used_last(), config))


@stage_command(EXPORT.config)
def export(execution: Execution, given: dict[str, Any]) -> None:
    """Packs the integers into a diffusers folder."""
    _continue(execution, EXPORT, given, reads="reconstruct")


@stage_command(EVALUATE.config, flags.REQUIRE)
def evaluate(execution: Execution, given: dict[str, Any]) -> None:
    """Measures an export's quality."""
    _continue(execution, EVALUATE, given, reads="export", requirements=parse_requirements(given["require"]))


@stage_command(SAMPLE.config)
def sample(execution: Execution, given: dict[str, Any]) -> None:
    """Samples images from an export."""
    _continue(execution, SAMPLE, given, reads="export")


_ROOFLINE = flags.parameter(
    "roofline",
    bool,
    default=False,
    help="With --model, print the roofline bound of the time for several GPUs, without measuring anything.",
)


@stage_command(BENCH.config, _ROOFLINE, flags.REQUIRE)
def bench(execution: Execution, given: dict[str, Any]) -> None:
    """Measures speed, memory and size against full precision."""
    requirements = parse_requirements(given["require"])
    if given["roofline"]:
        _print_rooflines(execution, given)
        return
    model = given["model"] or execution.from_file("bench", "model")
    run_folder = execution.run_used_last() if model is None else execution.run_of_model(model)
    bits: dict[str, Any] = {}
    if not given["bits"] and execution.from_file("bench", "bits") is None:
        width = BitWidth(weight=8, activation=8) if model is not None else bits_used_last(run_folder, "export")
        bits = {"bits": [(width,)]}
    config = execution.configure(BENCH, {**given, **bits})
    execution.conclude(execution.perform(BENCH, run_folder, config), requirements=requirements)


def configure_collect(execution: Execution, given: dict[str, Any]) -> CollectConfig:
    """Returns the configuration of `collect`, with the defaults of the recipe if one is named."""
    return _with_defaults_of_recipe(execution, COLLECT, given)


def configure_select(execution: Execution, given: dict[str, Any]) -> SelectConfig:
    """Returns the configuration of `select`, with the defaults of the recipe if one is named.

    Raises:
        UsageError: There is no such strategy.
    """
    from edadm_cli.select.strategies import strategy_named

    config = _with_defaults_of_recipe(execution, SELECT, given)
    strategy_named(config.strategy)
    return config


def _with_defaults_of_recipe(execution: Execution, stage: Stage[ConfigT], given: dict[str, Any]) -> ConfigT:
    """Returns the configuration of a stage for which recipes have a table of defaults; flags and file override them."""
    recipe = given["recipe"] or execution.from_file("reconstruct", "recipe")
    defaults = {}
    if recipe is not None:
        defaults = getattr(load_recipe(recipe_name(recipe)), stage.kind).model_dump(exclude_none=True)
    chosen = execution.configure(stage, given).model_dump(exclude_unset=True)
    return stage.config.model_validate({**defaults, **chosen})


def configure_reconstruct(execution: Execution, given: dict[str, Any]) -> ReconstructConfig:
    """Returns the configuration of `reconstruct`, with the recipe `default` if none is named.

    Raises:
        UsageError: No bit width is given.
    """
    if given["bits"] is None and execution.from_file("reconstruct", "bits") is None:
        raise UsageError("reconstruct needs --bits.", hint="edadm reconstruct --bits w4a8")
    recipe = given["recipe"] or execution.from_file("reconstruct", "recipe") or "default"
    return execution.configure(RECONSTRUCT, {**given, "recipe": recipe})


def _continue(
    execution: Execution,
    stage: Stage[Any],
    given: dict[str, Any],
    *,
    reads: str,
    requirements: Iterable[Requirement] = (),
) -> None:
    """Performs a stage that continues a run, with the run's last bit width if none is given."""
    run_folder = execution.run_used_last()
    config = execution.configure(stage, {**given, **_bits(execution, given, run_folder, reads)})
    run_folder.require(reads, str(config.bits))  # before the stage is imported
    execution.conclude(execution.perform(stage, run_folder, config), requirements=requirements)


def _bits(execution: Execution, given: dict[str, Any], run_folder: RunFolder, reads: str) -> dict[str, Any]:
    if given["bits"] is not None or execution.from_file(execution.command, "bits") is not None:
        return {}
    return {"bits": bits_used_last(run_folder, reads)}


def _print_rooflines(execution: Execution, given: dict[str, Any]) -> None:
    from edadm_cli.bench.roofline import model_rooflines

    if given["model"] is None:
        raise UsageError("--roofline needs --model.", hint="edadm bench --roofline --model sd15-random")
    values = {"bits": [(BitWidth(weight=8, activation=8),)], "batch_sizes": given["batch_sizes"] or ["2"]}
    batch_sizes = execution.configure(BENCH, values).batch_sizes
    tables = {str(batch): model_rooflines(given["model"], batch).to_json() for batch in batch_sizes}
    execution.print_facts({"model": given["model"], "rooflines": tables}, None)
