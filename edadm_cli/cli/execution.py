"""What every command does around its stage: read the shared options, plan or run, print, exit."""

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
from edadm_cli.cli import flags, places, settings
from edadm_cli.cli.boundary import report_error
from edadm_cli.cli.console import ConsoleReporter, calm_libraries
from edadm_cli.cli.contention import Scheduling
from edadm_cli.cli.require import Requirement, unmet
from edadm_cli.cli.sink import Output, show
from edadm_cli.config import BitWidth, StageConfig
from edadm_cli.errors import EdadmError, UsageError
from edadm_cli.launching import launched, launched_index

ConfigT = TypeVar("ConfigT", bound=StageConfig)

_BUSY = 0.1  # share of the processor time that a probe may lose to others


@dataclass
class Execution:
    """One invocation of a command, with what the shared options say."""

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
        """Returns what the configuration file says of a stage's field; `None` where it says nothing."""
        return settings.from_file(self.file, stage, key)

    def run_used_last(self) -> RunFolder:
        """Returns the run that the command continues."""
        return places.run_used_last(self.run_folder)

    def run_of_model(self, model: str) -> RunFolder:
        """Returns the run of a command that names a model."""
        return places.run_of_model(self.run_folder, model)

    def perform(
        self, stage: Stage[ConfigT], run_folder: RunFolder, config: ConfigT, *, may_be_finished: bool = True
    ) -> StageRecord:
        """Runs a stage; with `--dry-run` sees whether it is up to date, and else estimates it.

        What a library prints meanwhile goes to stderr.

        Args:
            stage: The stage.
            run_folder: The run.
            config: The stage's configuration.
            may_be_finished: Whether a dry run looks for finished work; without use where what it reads will change.
        """
        reset_peak()
        self.reporter.warnings = []
        with contextlib.redirect_stdout(sys.stderr):
            if self.dry_run:
                finished = self._finished(stage, run_folder, config) if may_be_finished else None
                return self._foresee(stage, run_folder, config, finished)
            record = stage.run(config, run_folder, force=self.force, reporter=self.reporter)
        self.warnings += record.warnings
        self._remember(run_folder, config)
        return record

    def _finished(self, stage: Stage[ConfigT], run_folder: RunFolder, config: ConfigT) -> Artifact | None:
        """Returns the work that the stage would find finished and leave as it is."""
        if self.force or launched_index() > 0:
            return None
        finished = stage.finished(config, run_folder)
        if finished is not None and stage.repeats:
            self.reporter.warn(f"{finished.path} is there, with the same settings; it will be made anew.")
            return None
        return finished

    def _foresee(
        self, stage: Stage[ConfigT], run_folder: RunFolder, config: ConfigT, finished: Artifact | None
    ) -> StageRecord:
        """Returns what a stage would do: nothing where its work is finished, else work of the estimated size."""
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
        """Notes what was used last; where that cannot be written, the work is done all the same."""
        if launched_index() > 0:
            return
        bits = getattr(config, "bits", None)
        try:
            places.remember_run(run_folder)
            if isinstance(bits, BitWidth):
                places.remember_bits(run_folder, str(bits))
        except EdadmError as error:
            self.reporter.note(f"What was used last is not remembered: {error.message}")

    def conclude(
        self, record: StageRecord, path: str | None = None, requirements: Iterable[Requirement] | None = None
    ) -> None:
        """Prints a record; then exits with 5 when a requirement is not met."""
        result = json.loads(record.model_dump_json())  # numbers that JSON lacks become null
        due = [] if self.dry_run else requirements or []
        self.print(result, [requirement.check(result) for requirement in due], path or record.artifact)

    def print_facts(self, facts: Mapping[str, Any], path: str | None) -> None:
        """Prints facts that belong to no run: the keys that every command has, and these."""
        common = {"command": self.command, "status": "done", "run": None, "artifact": None, "identity": None}
        self.print({**common, "seconds": time.monotonic() - self.started, "warnings": [], **facts}, [], path)

    def print(self, result: Mapping[str, Any], outcomes: list[dict[str, Any]], path: str | None) -> None:
        """Prints a JSON object, with the outcomes of its requirements where there are some."""
        if launched_index() > 0:
            return
        show(self.output, {**result, "requirements": outcomes} if outcomes else result, path)
        missed = unmet(outcomes)
        if missed is not None:
            report_error(missed)
            raise typer.Exit(missed.exit_code)


Body = Callable[[Execution, dict[str, Any]], None]


def stage_command(config: type[StageConfig] | None, *more: flags.Parameter) -> Callable[[Body], Callable[..., None]]:
    """Makes a command that builds something in a run: the configuration's options, then `more`, then the shared."""
    own = flags.stage_parameters(config) if config is not None else []
    return _command([*own, *more], flags.STAGE)


def run_command(*own: flags.Parameter) -> Callable[[Body], Callable[..., None]]:
    """Makes a command that reads a run: its own options, `--run`, and the form of the output."""
    return _command(own, (flags.RUN, *flags.OUTPUT))


def output_command(*own: flags.Parameter) -> Callable[[Body], Callable[..., None]]:
    """Makes a command that needs no run: its own options, then the form of the output."""
    return _command(own, flags.OUTPUT)


def _command(
    own: Iterable[flags.Parameter], shared: Iterable[flags.Parameter]
) -> Callable[[Body], Callable[..., None]]:
    """Gives a command's body its own options as a dictionary, and an `Execution` made of the shared ones."""
    names = [option.name for option in shared]
    parameters = [*own, *shared]

    def decorate(body: Body) -> Callable[..., None]:
        def command(**values: Any) -> None:
            execution = _begin(body.__name__, **{name: values.pop(name) for name in names})
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
    calm_libraries(verbose)
    return Execution(
        command=command,
        output=output,
        reporter=ConsoleReporter(
            bars=sys.stderr.isatty() and not quiet and launched_index() == 0,
            verbose=verbose,
            silent=launched_index() > 0,
        ),
        run_folder=run_folder,
        file=settings.read_config_file(config_file),
        shared=shared,
        force=force,
        dry_run=dry_run,
    )
