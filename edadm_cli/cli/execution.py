"""What every command does around its stage: read the shared options, plan or run, print, exit."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import sys
import time
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar

import typer

from edadm_cli.cli import options
from edadm_cli.cli.boundary import tell_error
from edadm_cli.cli.console import ConsoleReporter, calm_libraries
from edadm_cli.cli.contention import Scheduling
from edadm_cli.cli.require import Requirement, unmet
from edadm_cli.cli.sink import Output, show
from edadm_cli.errors import EdadmError, UsageError
from edadm_cli.launching import launched, launched_index

if TYPE_CHECKING:
    from edadm_cli.artifacts import Artifact, Estimate, Plan, RunFolder, StageRecord
    from edadm_cli.config import StageConfig
    from edadm_cli.progress import Reporter

P = ParamSpec("P")
ConfigT = TypeVar("ConfigT", bound="StageConfig")
ConfigT_contra = TypeVar("ConfigT_contra", bound="StageConfig", contravariant=True)

_BUSY = 0.1  # share of the processor time that a probe may lose to others
_PARALLEL = ("collect", "reconstruct", "evaluate")
_OUTPUT: dict[str, tuple[Any, Any]] = {
    "json_output": (options.JsonOption, False),
    "quiet": (options.QuietOption, False),
    "verbose": (options.VerboseOption, False),
}
_PLACE: dict[str, tuple[Any, Any]] = {"run_folder": (options.RunOption, None), **_OUTPUT}
_STAGE: dict[str, tuple[Any, Any]] = {
    "run_folder": (options.RunOption, None),
    "config": (options.ConfigOption, None),
    "seed": (options.SeedOption, None),
    "device": (options.DeviceOption, None),
    "force": (options.ForceOption, False),
    "dry_run": (options.DryRunOption, False),
    **_OUTPUT,
}


class StageRun(Protocol[ConfigT_contra]):
    """The entry point of a stage."""

    def __call__(
        self, config: ConfigT_contra, run: RunFolder, *, force: bool = False, reporter: Reporter | None = None
    ) -> StageRecord:
        """Build the stage's artifact, or find it up to date."""


class StageEstimate(Protocol[ConfigT_contra]):
    """What a stage would cost."""

    def __call__(self, config: ConfigT_contra, run: RunFolder) -> Estimate:
        """Probe; write nothing."""


class StagePlan(Protocol[ConfigT_contra]):
    """What a stage would build."""

    def __call__(self, config: ConfigT_contra, run: RunFolder) -> Plan:
        """Settle what decides the artifact's identity; write nothing."""


class StageFinished(Protocol[ConfigT_contra]):
    """What a stage finds done that looks by other rules than a plan's identity."""

    def __call__(self, config: ConfigT_contra, run: RunFolder) -> Artifact | None:
        """Look; write nothing."""


@dataclass
class Execution:
    """One invocation of a command, with what the shared options say."""

    command: str
    output: Output
    reporter: ConsoleReporter
    run_folder: Path | None = None
    file: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    force: bool = False
    dry_run: bool = False
    warnings: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def configure(self, kind: type[ConfigT], stage: str | None = None, **flags: Any) -> ConfigT:
        """A stage's configuration from the file, the shared flags and the stage's own."""
        from edadm_cli.cli import settings

        fields = settings.stage_fields(self.file, stage or self.command, {**self.flags, **flags})
        return settings.build_config(kind, fields)

    def from_file(self, stage: str, key: str) -> Any:
        """What the configuration file says of a stage's field; `None` where it says nothing."""
        return self.file.get(stage, {}).get(key, self.file.get(key))

    def run_used_last(self) -> RunFolder:
        """The run that the command continues."""
        from edadm_cli.cli import places

        return places.run_used_last(self.run_folder)

    def perform(
        self,
        command: str,
        run: RunFolder,
        name: str | None,
        stage: StageRun[ConfigT],
        estimate: StageEstimate[ConfigT],
        config: ConfigT,
        plan: StagePlan[ConfigT] | None = None,
        place: Path | None = None,
        finished: StageFinished[ConfigT] | None = None,
        always_anew: bool = False,
    ) -> StageRecord:
        """Run a stage; with `--dry-run` see whether it is up to date, and else estimate it.

        What a library prints meanwhile goes to stderr. A stage that works `always_anew` is never up to date.
        """
        from edadm_cli.artifacts.peak import reset_peak

        reset_peak()
        self.reporter.warnings = []
        with contextlib.redirect_stdout(sys.stderr):
            if self.dry_run:
                found = self._finished(command, run, plan, finished, config)
                if found is not None and always_anew:
                    self.reporter.warn(f"{found.path} is there, with the same settings; it will be made anew.")
                    found = None
                return self._foresee(command, run, found, estimate, config, place or run.path(command, name))
            record = stage(config, run, force=self.force, reporter=self.reporter)
        self.warnings += record.warnings
        self._remember(run, name)
        return record

    def _foresee(
        self,
        command: str,
        run: RunFolder,
        found: Artifact | None,
        estimate: StageEstimate[ConfigT],
        config: ConfigT,
        place: Path,
    ) -> StageRecord:
        """What a stage would do: nothing where its artifact was found, else work of the estimated size."""
        from edadm_cli.artifacts import StageRecord, spent

        if launched_index() > 0:
            raise typer.Exit
        started, scheduling = time.monotonic(), Scheduling()
        cost = None if found else estimate(config, run)
        if cost is not None and (lost := scheduling.share_lost()) > _BUSY:
            self.reporter.warn(
                f"Other work took {lost:.0%} of the processor time that the probe wanted, and the estimate takes that"
                " to last."
            )
        return StageRecord(
            command=command,
            status="up_to_date" if found else "planned",
            run=str(run.root),
            artifact=str(found.path if found else place),
            identity=found.identity if found else None,
            warnings=tuple(self.reporter.warnings),
            estimate=cost,
            **spent(started),
        )

    def _finished(
        self,
        kind: str,
        run: RunFolder,
        plan: StagePlan[ConfigT] | None,
        finished: StageFinished[ConfigT] | None,
        config: ConfigT,
    ) -> Artifact | None:
        """The artifact that the stage would find up to date; nothing is resolved where the run holds none of the kind.

        Raises:
            InputError: The stage itself would refuse, for the same reason.
        """
        if self.force or launched_index() > 0:
            return None
        if finished is not None:
            return finished(config, run)
        if plan is None or not (run.has(kind) or run.names(kind)):
            return None
        return run.finished(plan(config, run))

    def _remember(self, run: RunFolder, name: str | None) -> None:
        """Note what was used last; where that cannot be written, the work is done all the same."""
        if launched_index() > 0:
            return
        from edadm_cli.cli import places

        try:
            places.remember_run(run)
            if name is not None:
                places.remember_bits(run, name)
        except EdadmError as error:
            self.reporter.note(f"What was used last is not remembered: {error.message}")

    def conclude(
        self, record: StageRecord, path: str | None = None, requirements: list[Requirement] | None = None
    ) -> None:
        """Print a record; then exit with 5 when a requirement is not met."""
        result = json.loads(record.model_dump_json())  # numbers that JSON lacks become null
        due = [] if self.dry_run else requirements or []
        self.print(result, [requirement.check(result) for requirement in due], path or record.artifact)

    def print_facts(self, facts: Mapping[str, Any], path: str | None) -> None:
        """Print what was looked up, of no run: the keys that every command has, and these."""
        common = {"command": self.command, "status": "done", "run": None, "artifact": None, "identity": None}
        self.print({**common, "seconds": time.monotonic() - self.started, "warnings": [], **facts}, [], path)

    def print(self, result: Mapping[str, Any], outcomes: list[dict[str, Any]], path: str | None) -> None:
        """Print a JSON object, with the outcomes of its requirements where there are some."""
        if launched_index() > 0:
            return
        show(self.output, {**result, "requirements": outcomes} if outcomes else result, path)
        missed = unmet(outcomes)
        if missed is not None:
            tell_error(missed)
            raise typer.Exit(missed.exit_code)


def stage_command(function: Callable[Concatenate[Execution, P], None]) -> Callable[..., None]:
    """A command that builds something in a run: all shared options."""
    return _with_shared(function, _STAGE)


def place_command(function: Callable[Concatenate[Execution, P], None]) -> Callable[..., None]:
    """A command that reads a run: `--run` and the form of the output."""
    return _with_shared(function, _PLACE)


def output_command(function: Callable[Concatenate[Execution, P], None]) -> Callable[..., None]:
    """A command that needs no run: the form of the output."""
    return _with_shared(function, _OUTPUT)


def _with_shared(
    function: Callable[Concatenate[Execution, P], None], shared: Mapping[str, tuple[Any, Any]]
) -> Callable[..., None]:
    """Give a command the shared options after its own, and an `Execution` made of them."""
    name = function.__name__.rstrip("_")

    @functools.wraps(function)
    def command(**values: Any) -> None:
        execution = _begin(name, **{key: values.pop(key) for key in shared})
        function(execution, **values)  # type: ignore[call-arg]

    hints = typing.get_type_hints(function, include_extras=True)
    own = list(inspect.signature(function).parameters.values())[1:]
    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[parameter.name]) for parameter in own
    ] + [
        inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for key, (annotation, default) in shared.items()
    ]
    del command.__wrapped__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _begin(
    command: str,
    *,
    json_output: bool,
    quiet: bool,
    verbose: bool,
    run_folder: Path | None = None,
    config: Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    **flags: Any,
) -> Execution:
    from edadm_cli.cli import settings

    launch = launched()
    if launch.launcher is not None and command not in _PARALLEL:
        raise UsageError(
            f"edadm {command} runs in one process, and {launch.count} were started; several share the work of "
            f"{', '.join(_PARALLEL)}.",
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
        file=settings.read_config_file(config),
        flags=flags,
        force=force,
        dry_run=dry_run,
    )
