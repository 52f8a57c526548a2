"""The whole chain as one command: stages that are up to date are skipped."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from dataclasses import dataclass
from typing import Any

from edadm_cli.artifacts import RunFolder, RunRecord, Stage, StageRecord, spent
from edadm_cli.cli import flags
from edadm_cli.cli.execution import Execution, stage_command
from edadm_cli.cli.require import Requirement, first_problem, parse_requirements
from edadm_cli.cli.stages import (
    COLLECT,
    EVALUATE,
    EXPORT,
    RECONSTRUCT,
    SELECT,
    configure_collect,
    configure_reconstruct,
    configure_select,
)
from edadm_cli.config import BenchConfig, BitWidth, CollectConfig, SelectConfig, StageConfig
from edadm_cli.errors import InputError, UsageError
from edadm_cli.stage_config import SIZE_ARGUMENTS

_OWN = (
    flags.field_parameter(COLLECT.config, "model"),
    flags.several_bits("Bits of weights and activations, 2 to 8 each, repeatable or with commas: w8a8,w4a8."),
    flags.RECIPE,
    flags.field_parameter(EVALUATE.config, "num_images"),
    *(
        flags.field_parameter(COLLECT.config, name)
        for name in (
            *("num_trajectories", "num_steps", "guidance_scale", "prompts", "images"),
            *SIZE_ARGUMENTS,
            *("dtype", "prediction_type"),
        )
    ),
    *(flags.field_parameter(EXPORT.config, name) for name in ("text_encoders", "measure")),
    flags.REQUIRE,
)


@stage_command(None, *_OWN)
def run(execution: Execution, given: dict[str, Any]) -> None:
    """Runs the whole chain."""
    requirements = parse_requirements(given["require"])
    settings = _configure(execution, given)
    chain = _Chain(execution, execution.run_of_model(settings.collect.model))
    _print(execution, chain.perform(settings), requirements)


@dataclass(frozen=True)
class _Settings:
    """The configurations of all stages, which are checked before the first stage starts."""

    collect: CollectConfig
    select: SelectConfig
    by_bits: dict[str, dict[Stage[Any], StageConfig]]


def _configure(execution: Execution, given: dict[str, Any]) -> _Settings:
    widths = flags.widths_of(given["bits"]) or _widths_of_file(execution)
    if not widths:
        raise UsageError("run needs --bits.", hint="edadm run --model digits-sd --bits w4a8")
    evaluation = {"num_images": given["num_images"], "prompts": given["prompts"]}
    by_bits: dict[str, dict[Stage[Any], StageConfig]] = {}
    exporting = {"text_encoders": given["text_encoders"], "measure": given["measure"]}
    collect = configure_collect(execution, given)
    for bits in widths:
        by_bits[str(bits)] = {
            RECONSTRUCT: configure_reconstruct(execution, {"recipe": given["recipe"], "bits": bits}),
            EXPORT: execution.configure(EXPORT, {"bits": bits, **exporting}),
            EVALUATE: execution.configure(EVALUATE, {"bits": bits, **evaluation}),
        }
    return _Settings(collect, configure_select(execution, {"recipe": given["recipe"]}), by_bits)


def _widths_of_file(execution: Execution) -> tuple[BitWidth, ...]:
    """Returns the bit widths that the configuration file names, one or several."""
    value = execution.from_file("reconstruct", "bits")
    if not value:
        return ()
    return BenchConfig(bits=value if isinstance(value, list) else str(value)).bits


class _Chain:
    """Runs the stages in order on one run folder."""

    def __init__(self, execution: Execution, run_folder: RunFolder) -> None:
        self.execution = execution
        self.run_folder = run_folder

    def perform(self, settings: _Settings) -> RunRecord:
        """Runs all stages, or plans them, and writes the page."""
        started = time.monotonic()
        collected = self._perform(COLLECT, settings.collect, [])
        calibration = [collected, self._perform(SELECT, settings.select, [collected])]
        results = {bits: self._quantize(configs, calibration) for bits, configs in settings.by_bits.items()}
        page = None if self.execution.dry_run else self._report(list(results))
        records = [*calibration, *(record for stages in results.values() for record in stages.values())]
        return RunRecord(
            status=self._status(records),
            run=str(self.run_folder.root),
            warnings=tuple(self.execution.warnings),
            **_spent(started, records),
            collect=calibration[0],
            select=calibration[1],
            results=results,
            report=page,
        )

    def _quantize(
        self, configs: dict[Stage[Any], StageConfig], calibration: list[StageRecord]
    ) -> dict[str, StageRecord]:
        records: dict[str, StageRecord] = {}
        for stage, config in configs.items():
            records[stage.kind] = self._perform(stage, config, [*calibration, *records.values()])
        return records

    def _report(self, bits: list[str]) -> str:
        from edadm_cli.report import stage  # imports the modules that draw the plots

        with contextlib.redirect_stdout(sys.stderr):
            return str(stage.run(self.run_folder, bits))

    def _perform(self, stage: Stage[Any], config: StageConfig, before: list[StageRecord]) -> StageRecord:
        """Performs a stage; a dry run cannot estimate a stage whose inputs are not built yet."""
        self.execution.reporter.note(f"{stage.kind} {getattr(config, 'bits', '')}".strip())
        is_on_new = any(record.status == "planned" for record in before)
        try:
            return self.execution.perform(stage, self.run_folder, config, may_be_finished=not is_on_new)
        except InputError:
            if not is_on_new:
                raise
        artifact = str(stage.path(config, self.run_folder))
        return StageRecord(command=stage.kind, status="planned", run=str(self.run_folder.root), artifact=artifact)

    def _status(self, records: list[StageRecord]) -> Any:
        if all(record.status == "up_to_date" for record in records):
            return "up_to_date"
        return "planned" if self.execution.dry_run else "done"


def _spent(started: float, records: list[StageRecord]) -> dict[str, Any]:
    """Returns the time of the chain and its peak memory, which is the highest of the stages' peaks."""
    whole = spent(started)
    for key in ("peak_memory_mib", "peak_cuda_memory_mib"):
        peaks = [whole[key], *(getattr(record, key) for record in records)]
        whole[key] = max((peak for peak in peaks if peak is not None), default=None)
    return whole


def _print(execution: Execution, record: RunRecord, requirements: list[Requirement]) -> None:
    result = json.loads(record.model_dump_json(serialize_as_any=True))
    due = [] if execution.dry_run else requirements
    evaluated = {bits: by_stage["evaluate"] for bits, by_stage in result["results"].items() if due}
    outcomes = [{"bits": bits, **requirement.check(each)} for bits, each in evaluated.items() for requirement in due]
    problems = (first_problem(due, each) for each in evaluated.values())
    execution.print(result, outcomes, record.report, next((each for each in problems if each is not None), None))
