"""The whole chain as one command: what is up to date is skipped, what is missing is built."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edadm_cli.cli import options
from edadm_cli.cli.execution import Execution, stage_command
from edadm_cli.cli.require import Requirement, parse_requirements
from edadm_cli.errors import InputError, UsageError

if TYPE_CHECKING:
    from edadm_cli.artifacts import RunFolder, RunRecord, StageRecord
    from edadm_cli.config import BitWidth, CollectConfig


@stage_command
def run(
    execution: Execution,
    model: options.ModelOption = None,
    bits: Annotated[
        list[str] | None,
        typer.Option("--bits", metavar="wXaY", help="Bit widths, repeatable or with commas: w8a8,w4a8."),
    ] = None,
    recipe: options.RecipeOption = None,
    num_trajectories: options.NumTrajectoriesOption = None,
    num_steps: options.NumStepsOption = None,
    guidance_scale: options.GuidanceScaleOption = None,
    dtype: options.DTypeOption = None,
    prompts: options.PromptsOption = None,
    num_images: options.NumImagesOption = None,
    require: options.RequireOption = None,
) -> None:
    """Do the whole chain.

    Collect, select, reconstruct, export, evaluate, report; what is up to date is skipped.
    """
    from edadm_cli.artifacts import RunRecord
    from edadm_cli.cli.places import run_of_model
    from edadm_cli.cli.settings import parse_bits
    from edadm_cli.config import CollectConfig

    started = time.monotonic()
    requirements = parse_requirements(require)
    widths = parse_bits(bits or _bits_of_file(execution))
    if not widths:
        raise UsageError("run needs --bits.", hint="edadm run --model digits-sd --bits w4a8")
    collect = execution.configure(
        CollectConfig,
        "collect",
        model=model,
        num_trajectories=num_trajectories,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        dtype=dtype,
        prompts=prompts,
    )
    folder = run_of_model(execution.run_folder, collect.model)
    chain = _Chain(execution, folder)
    collected, selected = chain.calibrate(collect, recipe)
    results = {
        str(width): chain.quantize(width, recipe, num_images=num_images, prompts=prompts) for width in widths
    }
    page = None if execution.dry_run else chain.report([str(width) for width in widths])
    records = [
        collected,
        selected,
        *(record for by_stage in results.values() for record in by_stage.values()),
    ]
    record = RunRecord(
        status=_overall(execution, records),
        run=str(folder.root),
        seconds=time.monotonic() - started,
        warnings=tuple(execution.warnings),
        collect=collected,
        select=selected,
        results=results,
        report=page,
    )
    _print(execution, record, requirements)


class _Chain:
    """The stages in order, on one run folder."""

    def __init__(self, execution: Execution, folder: RunFolder) -> None:
        self.execution = execution
        self.folder = folder

    def calibrate(self, config: CollectConfig, recipe: str | None) -> tuple[StageRecord, StageRecord]:
        """Collect and select."""
        from edadm_cli.cli.settings import configure_select
        from edadm_cli.collect import stage as collect
        from edadm_cli.select import stage as select

        return (
            self._perform("collect", None, collect, config),
            self._perform("select", None, select, configure_select(self.execution, recipe)),
        )

    def quantize(self, bits: BitWidth, recipe: str | None, **evaluation: Any) -> dict[str, StageRecord]:
        """Reconstruct, export and evaluate one bit width."""
        from edadm_cli.cli.settings import configure_reconstruct
        from edadm_cli.config import EvaluateConfig, ExportConfig
        from edadm_cli.evaluate import stage as evaluate
        from edadm_cli.export import stage as export
        from edadm_cli.reconstruct import stage as reconstruct

        configure = self.execution.configure
        return {
            "reconstruct": self._perform(
                "reconstruct", bits, reconstruct, configure_reconstruct(self.execution, recipe, str(bits))
            ),
            "export": self._perform("export", bits, export, configure(ExportConfig, "export", bits=bits)),
            "evaluate": self._perform(
                "evaluate", bits, evaluate, configure(EvaluateConfig, "evaluate", bits=bits, **evaluation)
            ),
        }

    def report(self, bits: list[str]) -> str:
        """Write the page."""
        from edadm_cli.report import stage

        with contextlib.redirect_stdout(sys.stderr):
            return str(stage.run(self.folder, bits))

    def _perform(self, command: str, bits: BitWidth | None, stage: Any, config: Any) -> StageRecord:
        name = None if bits is None else str(bits)
        self.execution.reporter.note(f"{command} {name or ''}".strip())
        try:
            return self.execution.perform(command, self.folder, name, stage.run, stage.estimate, config)
        except InputError:
            if not self.execution.dry_run or command == "collect":
                raise
        from edadm_cli.artifacts import StageRecord

        # The stage before has not run yet, so that there is nothing to probe.
        artifact = str(self.folder.path(command, name))
        return StageRecord(command=command, status="planned", run=str(self.folder.root), artifact=artifact)


def _bits_of_file(execution: Execution) -> list[str]:
    value = execution.from_file("reconstruct", "bits")
    return [str(item) for item in value] if isinstance(value, list) else [str(value)] if value else []


def _overall(execution: Execution, records: list[StageRecord]) -> Any:
    if execution.dry_run:
        return "planned"
    return "up_to_date" if all(record.status == "up_to_date" for record in records) else "done"


def _print(execution: Execution, record: RunRecord, requirements: list[Requirement]) -> None:
    result = json.loads(record.model_dump_json(serialize_as_any=True))
    outcomes = []
    if record.status != "planned":
        outcomes = [
            {"bits": bits, **requirement.check(by_stage["evaluate"])}
            for bits, by_stage in result["results"].items()
            for requirement in requirements
        ]
    execution.print(result, outcomes, record.report)
