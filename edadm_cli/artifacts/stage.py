"""The interface of a stage for the command line, the library and the estimates, without the stage's heavy imports.

Each stage package exports a `STAGE`. Its functions are in the package's module `stage`, which is imported when the
first of them is called.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

from edadm_cli.artifacts.artifact import Artifact
from edadm_cli.artifacts.records import Estimate, StageRecord
from edadm_cli.artifacts.store import BuildSpec, RunFolder
from edadm_cli.config import StageConfig

if TYPE_CHECKING:
    from edadm_cli.progress import Reporter

ConfigT = TypeVar("ConfigT", bound=StageConfig)


class _StageModule(Protocol):
    """The functions of a stage's module. Modules with `finds_itself` have `finished` as well."""

    def run(
        self, config: Any, run_folder: RunFolder, *, force: bool = False, reporter: Reporter | None = None
    ) -> StageRecord: ...

    def build_spec(self, config: Any, run_folder: RunFolder) -> BuildSpec: ...

    def artifact_name(self, config: Any) -> str | None: ...

    def finished(self, config: Any, run_folder: RunFolder) -> Artifact | None: ...


class _EstimateModule(Protocol):
    """The function of the module of a stage in `edadm_cli.estimates`."""

    def estimate(self, config: Any, run_folder: RunFolder) -> Estimate: ...


@dataclass(frozen=True)
class Stage(Generic[ConfigT]):
    """One stage of the chain.

    Args:
        kind: The command's name, and the kind of the artifact that it writes.
        config: The stage's configuration.
        parallel: Whether several processes can share the work.
        repeats: Whether the stage runs again if its artifact exists already, as a measurement does.
        finds_itself: Whether the stage has a function `finished` of its own, instead of comparing identities.
        folder: Folder of the run that the stage writes to; by default its kind.
    """

    kind: str
    config: type[ConfigT]
    parallel: bool = False
    repeats: bool = False
    finds_itself: bool = False
    folder: str = ""

    @property
    def _module(self) -> _StageModule:
        return cast(_StageModule, importlib.import_module(f"edadm_cli.{self.kind}.stage"))

    def run(
        self, config: ConfigT, run_folder: RunFolder, *, force: bool = False, reporter: Reporter | None = None
    ) -> StageRecord:
        """Builds the stage's artifact, or finds it up to date."""
        return self._module.run(config, run_folder, force=force, reporter=reporter)

    def build_spec(self, config: ConfigT, run_folder: RunFolder) -> BuildSpec:
        """Returns the description of the artifact that `run` would build; writes nothing."""
        return self._module.build_spec(config, run_folder)

    def estimate(self, config: ConfigT, run_folder: RunFolder) -> Estimate:
        """Estimates time, memory and disk with short probes; writes nothing."""
        module = cast(_EstimateModule, importlib.import_module(f"edadm_cli.estimates.{self.kind}"))
        return module.estimate(config, run_folder)

    def artifact_name(self, config: ConfigT) -> str | None:
        """Returns the artifact's name within its kind; `None` if a run has only one artifact of the kind."""
        return self._module.artifact_name(config)

    def path(self, config: ConfigT, run_folder: RunFolder) -> Path:
        """Returns the path that the stage writes to, whether it exists or not."""
        return run_folder.path(self.folder or self.kind, self.artifact_name(config))

    def finished(self, config: ConfigT, run_folder: RunFolder) -> Artifact | None:
        """Returns the finished artifact that `run` would keep; `None` if there is none.

        Raises:
            InputError: The stage itself would refuse for the same reason.
        """
        if self.finds_itself:
            return self._module.finished(config, run_folder)
        if not (run_folder.has(self.kind) or run_folder.names(self.kind)):
            return None
        return run_folder.finished(self.build_spec(config, run_folder))
