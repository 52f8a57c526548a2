"""The whole chain as one command: what is up to date is skipped, what is missing is built."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edadm_cli.cli import options
from edadm_cli.cli.execution import Execution, stage_command
from edadm_cli.cli.require import Requirement, parse_requirements
from edadm_cli.errors import InputError, UsageError

if TYPE_CHECKING:
    from edadm_cli.artifacts import RunFolder, RunRecord, StageRecord
    from edadm_cli.config import BitWidth, CollectConfig, SelectConfig, StageConfig


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
    prediction_type: options.PredictionTypeOption = None,
    num_images: options.NumImagesOption = None,
    require: options.RequireOption = None,
) -> None:
    """Do the whole chain.

    Collect, select, reconstruct, export, evaluate, report; what is up to date is skipped.
    """
    from edadm_cli.cli.places import run_of_model
    from edadm_cli.cli.settings import parse_bits

    requirements = parse_requirements(require)
    collection = {
        "model": model,
        "num_trajectories": num_trajectories,
        "num_steps": num_steps,
        "guidance_scale": guidance_scale,
        "dtype": dtype,
        "prompts": prompts,
        "prediction_type": prediction_type,
    }
    evaluation = {"num_images": num_images, "prompts": prompts}
    widths = parse_bits(bits or _bits_of_file(execution))
    settings = _configure(execution, widths, recipe, collection, evaluation)
    chain = _Chain(execution, run_of_model(execution.run_folder, settings.collect.model))
    _print(execution, chain.perform(settings), requirements)


@dataclass(frozen=True)
class _Settings:
    """The configuration of every stage, settled before the first one starts."""

    collect: CollectConfig
    select: SelectConfig
    by_bits: dict[str, dict[str, StageConfig]]


def _configure(
    execution: Execution,
    widths: list[BitWidth],
    recipe: str | None,
    collection: dict[str, Any],
    evaluation: dict[str, Any],
) -> _Settings:
    from edadm_cli.cli.settings import configure_reconstruct, configure_select
    from edadm_cli.config import CollectConfig, EvaluateConfig, ExportConfig

    if not widths:
        raise UsageError("run needs --bits.", hint="edadm run --model digits-sd --bits w4a8")
    return _Settings(
        collect=execution.configure(CollectConfig, "collect", **collection),
        select=configure_select(execution, recipe),
        by_bits={
            str(bits): {
                "reconstruct": configure_reconstruct(execution, recipe, str(bits)),
                "export": execution.configure(ExportConfig, "export", bits=bits),
                "evaluate": execution.configure(EvaluateConfig, "evaluate", bits=bits, **evaluation),
            }
            for bits in widths
        },
    )


class _Chain:
    """The stages in order, on one run folder."""

    def __init__(self, execution: Execution, folder: RunFolder) -> None:
        self.execution = execution
        self.folder = folder

    def perform(self, settings: _Settings) -> RunRecord:
        """Do all stages, or plan them, and write the page."""
        from edadm_cli.artifacts import RunRecord

        started = time.monotonic()
        calibration = self._calibrate(settings)
        results = {bits: self._quantize(bits, configs, calibration) for bits, configs in settings.by_bits.items()}
        page = None if self.execution.dry_run else self._report(list(results))
        records = [*calibration, *(record for stages in results.values() for record in stages.values())]
        return RunRecord(
            status=self._status(records),
            run=str(self.folder.root),
            warnings=tuple(self.execution.warnings),
            **_spent(started, records),
            collect=calibration[0],
            select=calibration[1],
            results=results,
            report=page,
        )

    def _calibrate(self, settings: _Settings) -> list[StageRecord]:
        from edadm_cli.collect import stage as collect
        from edadm_cli.select import stage as select

        collected = self._perform("collect", None, collect, settings.collect, [])
        return [collected, self._perform("select", None, select, settings.select, [collected])]

    def _quantize(
        self, bits: str, configs: dict[str, StageConfig], calibration: list[StageRecord]
    ) -> dict[str, StageRecord]:
        from edadm_cli.evaluate import stage as evaluate
        from edadm_cli.export import stage as export
        from edadm_cli.reconstruct import stage as reconstruct

        stages = {"reconstruct": reconstruct, "export": export, "evaluate": evaluate}
        records: dict[str, StageRecord] = {}
        for command, stage in stages.items():
            before = [*calibration, *records.values()]
            records[command] = self._perform(command, bits, stage, configs[command], before)
        return records

    def _report(self, bits: list[str]) -> str:
        from edadm_cli.report import stage

        with contextlib.redirect_stdout(sys.stderr):
            return str(stage.run(self.folder, bits))

    def _perform(
        self, command: str, bits: str | None, stage: Any, config: StageConfig, before: list[StageRecord]
    ) -> StageRecord:
        from edadm_cli.artifacts import StageRecord

        self.execution.reporter.note(f"{command} {bits or ''}".strip())
        is_on_new = any(record.status == "planned" for record in before)  # what it reads will be built anew
        plan = None if is_on_new else stage.plan
        try:
            return self.execution.perform(command, self.folder, bits, stage.run, stage.estimate, config, plan)
        except InputError:
            if not is_on_new:
                raise
        # The stage before has not run yet, so that there is nothing to probe.
        artifact = str(self.folder.path(command, bits))
        return StageRecord(command=command, status="planned", run=str(self.folder.root), artifact=artifact)

    def _status(self, records: list[StageRecord]) -> Any:
        if all(record.status == "up_to_date" for record in records):
            return "up_to_date"
        return "planned" if self.execution.dry_run else "done"


def _spent(started: float, records: list[StageRecord]) -> dict[str, Any]:
    """What the chain took: its time, and the highest of the peaks, which begin anew with every stage."""
    from edadm_cli.artifacts import spent

    found = spent(started)
    for key in ("peak_memory_mib", "peak_cuda_memory_mib"):
        peaks = [found[key], *(getattr(record, key) for record in records)]
        found[key] = max((peak for peak in peaks if peak is not None), default=None)
    return found


def _bits_of_file(execution: Execution) -> list[str]:
    value = execution.from_file("reconstruct", "bits")
    return [str(item) for item in value] if isinstance(value, list) else [str(value)] if value else []


def _print(execution: Execution, record: RunRecord, requirements: list[Requirement]) -> None:
    result = json.loads(record.model_dump_json(serialize_as_any=True))
    outcomes = []
    if not execution.dry_run:
        outcomes = [
            {"bits": bits, **requirement.check(by_stage["evaluate"])}
            for bits, by_stage in result["results"].items()
            for requirement in requirements
        ]
    execution.print(result, outcomes, record.report)
