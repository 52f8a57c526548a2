"""The common part of all commands: it reads the shared options, runs or plans a stage, prints, and exits."""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import typer

from edadm_cli.artifacts import Artifact, RunFolder, Stage, StageRecord, spent
from edadm_cli.artifacts.peak import reset_peak
from edadm_cli.cli import current_run, flags, settings
from edadm_cli.cli.boundary import report_error
from edadm_cli.cli.console import ConsoleReporter, can_redraw
from edadm_cli.cli.contention import Scheduling
from edadm_cli.cli.output import Output, show
from edadm_cli.cli.process_setup import keep_freed_memory, share_gpu_memory, silence_libraries
from edadm_cli.cli.require import Requirement, first_problem, unmet
from edadm_cli.config import BitWidth, StageConfig
from edadm_cli.errors import EdadmError, UsageError
from edadm_cli.launching import launched, launched_index

ConfigT = TypeVar("ConfigT", bound=StageConfig)

_BUSY = 0.1  # share of processor time that other processes may take from a probe


@dataclass
class Execution:
    """One invocation of a command, with the values of the shared options."""

    command: str
    output: Output
    reporter: ConsoleReporter
    run_folder: Path | None = None
    file: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    force: bool = False
    dry_run: bool = False
    warnings: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def configure(self, stage: Stage[ConfigT], given: Mapping[str, Any]) -> ConfigT:
        """Returns a stage's configuration from the file, the shared flags and the stage's own flags."""
        values = flags.field_values(stage.config, {**self.shared, **given})
        return settings.build_config(stage, self.file, values)

    def from_file(self, stage: str, key: str) -> Any:
        """Returns the value of a stage's field in the configuration file; `None` if it has none."""
        return settings.from_file(self.file, stage, key)

    def run_used_last(self) -> RunFolder:
        """Returns the run that the command continues."""
        return current_run.run_used_last(self.run_folder)

    def run_of_model(self, model: str) -> RunFolder:
        """Returns the run of a command that names a model."""
        return current_run.run_of_model(self.run_folder, model)

    def perform(
        self, stage: Stage[ConfigT], run_folder: RunFolder, config: ConfigT, *, may_be_finished: bool = True
    ) -> StageRecord:
        """Runs a stage; with `--dry-run`, checks whether it is up to date and estimates it otherwise.

        Anything that a library prints meanwhile goes to stderr.

        Args:
            stage: The stage.
            run_folder: The run.
            config: The stage's configuration.
            may_be_finished: Whether a dry run looks for finished work; `False` if the inputs of the stage will change.
        """
        reset_peak()
        self.reporter.warnings = []
        with contextlib.redirect_stdout(sys.stderr):
            if self.dry_run:
                finished = self._finished(stage, run_folder, config) if may_be_finished else None
                return self._planned(stage, run_folder, config, finished)
            record = stage.run(config, run_folder, force=self.force, reporter=self.reporter)
            if stage.kind in ("export", "evaluate") and launched_index() == 0:
                self._update_card(run_folder, str(getattr(config, "bits", "")), is_new=record.status == "done")
        self.warnings += record.warnings
        self._remember(run_folder, config)
        return record

    def _update_card(self, run_folder: RunFolder, bits: str, is_new: bool) -> None:
        """Brings the model card of an export up to date with its evaluation; a card that is not is only a warning.

        Nothing is imported where there is nothing to do: without an evaluation, or when nothing is new and the card has
        its image grid already.
        """
        has_grid = (run_folder.path("export", bits) / "grid.png").is_file()
        if not run_folder.has("evaluate", bits) or (has_grid and not is_new):
            return
        from edadm_cli.export.card_file import update_card  # imports torch

        try:
            update_card(run_folder, bits)
        except EdadmError as error:
            self.reporter.warn(f"The model card of the export was not updated: {error.message}")

    def _finished(self, stage: Stage[ConfigT], run_folder: RunFolder, config: ConfigT) -> Artifact | None:
        """Returns the existing artifact that the stage would keep; `None` if it would build one."""
        if self.force or launched_index() > 0:
            return None
        finished = stage.finished(config, run_folder)
        if finished is not None and stage.repeats:
            self.reporter.warn(f"{finished.path} exists with the same settings; it will be built again.")
            return None
        return finished

    def _planned(
        self, stage: Stage[ConfigT], run_folder: RunFolder, config: ConfigT, finished: Artifact | None
    ) -> StageRecord:
        """Returns the record of a dry run: up to date, or planned with an estimate."""
        if launched_index() > 0:
            raise typer.Exit
        started, scheduling = time.monotonic(), Scheduling()
        cost = None if finished else stage.estimate(config, run_folder)
        if cost is not None and (lost := scheduling.share_lost()) > _BUSY:
            self.reporter.warn(
                f"Other work took {lost:.0%} of the processor time that the probe needed, and the estimate assumes that"
                " this goes on."
            )
        return StageRecord(
            command=stage.kind,
            status="up_to_date" if finished else "planned",
            run=str(run_folder.root),
            artifact=str(finished.path if finished else stage.path(config, run_folder)),
            identity=finished.identity if finished else None,
            warnings=tuple(self.reporter.warnings),
            estimate=cost,
            **spent(started),
        )

    def _remember(self, run_folder: RunFolder, config: StageConfig) -> None:
        """Remembers the run and bit width as used last; a failure to write that is only a warning."""
        if launched_index() > 0:
            return
        bits = getattr(config, "bits", None)
        try:
            current_run.remember_run(run_folder)
            if isinstance(bits, BitWidth):
                current_run.remember_bits(run_folder, str(bits))
        except EdadmError as error:
            self.reporter.note(f"The run and bit width that were used last are not remembered: {error.message}")

    def conclude(
        self, record: StageRecord, path: str | None = None, requirements: Iterable[Requirement] | None = None
    ) -> None:
        """Prints a record, and exits with 5 if a requirement is not met."""
        result = json.loads(record.model_dump_json())  # numbers that JSON lacks become null
        due = [] if self.dry_run else list(requirements or [])
        outcomes = [requirement.check(result) for requirement in due]
        self.print(result, outcomes, path or record.artifact, first_problem(due, result))

    def print_facts(self, facts: Mapping[str, Any], path: str | None) -> None:
        """Prints facts that belong to no run, together with the keys that every command has."""
        common = {"command": self.command, "status": "done", "run": None, "artifact": None, "identity": None}
        spent_on = {"seconds": time.monotonic() - self.started, "warnings": list(self.reporter.warnings)}
        self.print({**common, **spent_on, **facts}, [], path)

    def print(
        self,
        result: Mapping[str, Any],
        outcomes: list[dict[str, Any]],
        path: str | None,
        problem: EdadmError | None = None,
    ) -> None:
        """Prints a JSON object, with the outcomes of its requirements if there are any, and exits if one is not met.

        Args:
            result: The object.
            outcomes: The outcomes of the requirements.
            path: The path that `--quiet` prints; `None` prints nothing.
            problem: What is wrong with a requirement itself.
        """
        if launched_index() > 0:
            return
        show(self.output, {**result, "requirements": outcomes} if outcomes else result, path)
        failure = problem or unmet(outcomes)
        if failure is not None:
            report_error(failure)
            raise typer.Exit(failure.exit_code)


Body = Callable[[Execution, dict[str, Any]], None]


def stage_command(config: type[StageConfig] | None, *more: flags.Parameter) -> Callable[[Body], Callable[..., None]]:
    """Creates a command of a stage: it has the options of the configuration, `more` options, and the shared ones."""
    stage_options = flags.stage_parameters(config) if config is not None else []
    return _command([*stage_options, *more], flags.STAGE)


def run_command(*options: flags.Parameter) -> Callable[[Body], Callable[..., None]]:
    """Creates a command that reads a run: it has its own options, `--run`, and those of the output."""
    return _command(options, (flags.RUN, *flags.OUTPUT))


def output_command(*options: flags.Parameter) -> Callable[[Body], Callable[..., None]]:
    """Creates a command that needs no run: it has its own options and those of the output."""
    return _command(options, flags.OUTPUT)


def _command(
    options: Iterable[flags.Parameter], shared: Iterable[flags.Parameter]
) -> Callable[[Body], Callable[..., None]]:
    """Creates a command that passes an `Execution` made of the shared options and a dictionary of the other ones."""
    names = [option.name for option in shared]
    parameters = [*options, *shared]

    def decorate(body: Body) -> Callable[..., None]:
        def command(**values: Any) -> None:
            execution = _begin(body.__name__, **{name: values.pop(name) for name in names})
            with execution.reporter.alive(f"edadm {execution.command}"):
                body(execution, values)

        command.__doc__ = body.__doc__
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {option.name: option.annotation for option in parameters}
        return command

    return decorate


def _begin(
    command: str,
    *,
    json_output: bool,
    quiet: bool,
    verbose: bool,
    run_folder: Path | None = None,
    config_file: Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    **shared: Any,
) -> Execution:
    launch = launched()
    parallel = [stage.kind for stage in settings.STAGES.values() if stage.parallel]
    if launch.launcher is not None and command not in parallel:
        raise UsageError(
            f"edadm {command} runs in one process, and {launch.count} were started; several share the work of "
            f"{', '.join(parallel)}.",
            hint=f"edadm {command}, without {launch.launcher}",
        )
    output = Output.of(json_output, quiet)
    silence_libraries(verbose)
    keep_freed_memory()
    if command == "reconstruct":  # other stages run compiled graphs, which manage memory of their own
        share_gpu_memory()
    return Execution(
        command=command,
        output=output,
        reporter=ConsoleReporter(
            bars=can_redraw() and not quiet and launched_index() == 0,
            verbose=verbose,
            silent=launched_index() > 0,
            lines=not can_redraw() and not quiet,
        ),
        run_folder=run_folder,
        file=settings.read_config_file(config_file),
        shared=shared,
        force=force,
        dry_run=dry_run,
    )
