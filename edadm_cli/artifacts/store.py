"""A run folder: it has one folder per artifact, which is built beside its final path and renamed when complete.

    <run>/collect/  <run>/select/  <run>/reconstruct/w4a8/  <run>/export/w4a8/  <run>/evaluate/w4a8/

A build happens in `.<name>.partial-<identity>`; the manifest is written last, and one rename makes the
artifact visible. A killed build leaves its partial folder, and the next build with the same identity continues in it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, get_args

from edadm_cli.artifacts.artifact import Artifact, has_manifest, open_artifact
from edadm_cli.artifacts.build import Build, adopt, recover
from edadm_cli.artifacts.files import explained_os_errors
from edadm_cli.artifacts.identity import SCHEMA_VERSION, compute_identity, differences
from edadm_cli.artifacts.locks import BeingReadError, UnwritableError, read_lock, write_lock
from edadm_cli.artifacts.manifest import Manifest, ModelRef, ParentRef, now, read_manifest
from edadm_cli.bits import BitWidth
from edadm_cli.engine_config import CACHE_NAMES, FeaturesName
from edadm_cli.errors import InputError, UsageError, quoted
from edadm_cli.processes import ALONE, Processes

_CHANGES_SHOWN = 5
_NAME = re.compile(r"^[a-z0-9][a-z0-9._-]*$")
_CACHE = re.compile(rf"-({'|'.join(CACHE_NAMES)})(?:-(.+))?$")


def is_artifact_name(text: str) -> bool:
    """Returns whether a run folder can have an artifact of this kind or name."""
    return _NAME.match(text) is not None


@dataclass(frozen=True)
class BuildSpec:
    """The description of an artifact to build: its settings and its parents.

    Args:
        kind: The stage.
        name: The bit width if a run can have several artifacts of the kind, else `None`.
        config: The stage's `identity_fields()`, with all choices decided.
        seed: Seed of everything random in the stage.
        parents: Artifacts that are read, opened through the same run folder.
        model: The model that is quantized.
    """

    kind: str
    name: str | None
    config: dict[str, Any]
    seed: int
    parents: tuple[Artifact, ...]
    model: ModelRef

    @property
    def identity(self) -> str:
        """Hash of everything that decides the content."""
        return compute_identity(
            kind=self.kind,
            config=self.config,
            seed=self.seed,
            parents=[(parent.kind, parent.identity) for parent in self.parents],
            fingerprint=self.model.fingerprint,
        )


@dataclass(frozen=True)
class RunFolder:
    """The folder with the artifacts of one run.

    Args:
        root: The folder.
    """

    root: Path

    def path(self, kind: str, name: str | None = None) -> Path:
        """Returns the path of an artifact, whether it exists or not."""
        for part in (kind, name):
            if part is not None and not is_artifact_name(part):
                raise ValueError(f"'{part}' cannot name an artifact")
        return self.root / kind if name is None else self.root / kind / name

    def has(self, kind: str, name: str | None = None) -> bool:
        """Returns whether the artifact exists, without checking it."""
        return has_manifest(self.path(kind, name))

    def names(self, kind: str) -> list[str]:
        """Returns the names of the complete artifacts of a kind of which a run can have several."""
        folder = self.path(kind)
        if not folder.is_dir():
            return []
        return sorted(child.name for child in folder.iterdir() if is_artifact_name(child.name) and has_manifest(child))

    def require(self, kind: str, name: str | None = None) -> None:
        """Refuses a run without this artifact, whose files are not checked.

        Raises:
            InputError: The artifact is missing.
        """
        if not self.has(kind, name):
            raise InputError(f"There is no {_title(kind, name)} in the run {self.root}.", hint=self.command(kind, name))

    def open(self, kind: str, name: str | None = None) -> Artifact:
        """Opens an artifact and checks its files, and that its parents are those in the run now.

        Raises:
            InputError: The artifact is missing or broken, or was built from something that has changed since.
        """
        self.require(kind, name)
        path = self.path(kind, name)
        try:
            artifact = open_artifact(path, kind)
        except InputError as error:
            raise InputError(error.message, hint=error.hint or self.command(kind, name, force=True)) from error
        self.check_descent(artifact.manifest, name)
        return replace(artifact, remedy=self.command(kind, name, force=True))

    def check_descent(self, manifest: Manifest, name: str | None) -> None:
        """Compares the ancestors that a manifest names with the artifacts on disk.

        Raises:
            InputError: A parent on disk is not the one that was read.
        """
        for parent in manifest.parents:
            path = self.path(parent.kind, parent.name)
            if not has_manifest(path):
                continue
            current = read_manifest(path)
            if current.identity != parent.identity:
                raise InputError(
                    f"{_title(manifest.kind, name)} in {self.root} was made from another "
                    f"{_title(parent.kind, parent.name)} ({parent.identity[:12]}) than the one there now "
                    f"({current.identity[:12]}).",
                    hint=self.command(manifest.kind, name, force=True),
                )
            self.check_descent(current, parent.name)

    def command(self, kind: str, name: str | None = None, force: bool = False) -> str:
        """Returns the command that builds an artifact of this run."""
        words = ["edadm", kind]
        if kind == "collect":
            words += ["--model", "MODEL"]
        if kind == "engine":  # made again without --force, which would make the export again too
            words[1], force = "export", False
        if name is not None:
            words += _flags_of_name(kind, name)
        words += ["--run", str(self.root)]
        return quoted(*words, *(["--force"] if force else []))

    @contextmanager
    def build(self, spec: BuildSpec, force: bool = False, processes: Processes = ALONE) -> Iterator[Build]:
        """Locks an artifact while entered, and yields the folder to fill, or the finished artifact.

        With `force`, an artifact with the same identity is built again from scratch, and one with another identity is
        replaced (a killed build of that is resumed as usual). If there are several processes, the main one locks,
        decides and commits; the others get the same folder.

        Raises:
            InputError: Another process uses the artifact, a parent changed, the artifact on disk has another identity
                or is broken and `force` is not set, or the path is not an artifact.
            MachineError: The run folder cannot be written.
        """
        if not processes.is_main:
            yield self._joined(spec, processes)
            return
        with self._led(spec, force) as build:
            processes.share(build.up_to_date)
            yield build

    def _joined(self, spec: BuildSpec, processes: Processes) -> Build:
        """Returns the build of a process that is not the main one."""
        path = self.path(spec.kind, spec.name)
        if processes.share(None):
            manifest = read_manifest(path)
            return Build(path=path, target=path, manifest=manifest, artifact=Artifact(path, manifest))
        return Build(path=_partial_path(path, spec), target=path, manifest=self._draft(spec))

    @contextmanager
    def _led(self, spec: BuildSpec, force: bool) -> Iterator[Build]:
        path = self.path(spec.kind, spec.name)
        with ExitStack() as stack:
            try:
                stack.enter_context(write_lock(path))
            except (BeingReadError, UnwritableError):  # such an artifact can be reused, and nothing else
                stack.enter_context(read_lock(path))
                if force or not has_manifest(path):
                    raise
            for parent in spec.parents:
                stack.enter_context(read_lock(parent.path))
                self._check_unchanged(parent)
            with explained_os_errors(path):
                recover(path)
            finished = self.finished(spec, force)
            if finished is not None:
                yield Build(path=path, target=path, manifest=finished.manifest, artifact=finished)
                return
            partial = self._partial(path, spec, force)
            build = adopt(partial, path, spec.kind) or Build(path=partial, target=path, manifest=self._draft(spec))
            try:
                yield build
            finally:
                if partial.is_dir() and not any(partial.iterdir()):
                    partial.rmdir()

    def _check_unchanged(self, parent: Artifact) -> None:
        if not has_manifest(parent.path) or read_manifest(parent.path).identity != parent.identity:
            raise InputError(f"{parent.path} changed while it was being read.", hint="type the same command again")

    def finished(self, spec: BuildSpec, force: bool = False) -> Artifact | None:
        """Returns the artifact on disk, if it is the planned one and is not to be built again.

        Raises:
            InputError: Without `force`, it has another identity or is broken; or the path is not an artifact.
        """
        path = self.path(spec.kind, spec.name)
        if not has_manifest(path):
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise InputError(
                    f"{path} exists and is no artifact of edadm.",
                    hint="move it away, or use another folder with --run",
                )
            return None
        if force:
            return None
        redo = self.command(spec.kind, spec.name, force=True)
        try:
            artifact = open_artifact(path, spec.kind)
        except InputError as error:
            raise InputError(error.message, hint=redo) from error
        if artifact.identity != spec.identity:
            changes = _changes(artifact.manifest, spec)
            more = [f"and {len(changes) - _CHANGES_SHOWN} more"] if len(changes) > _CHANGES_SHOWN else []
            raise InputError(
                f"{path} was made with other settings ({'; '.join(changes[:_CHANGES_SHOWN] + more)}).",
                hint="repeat the options that it was made with, add --force to replace it, or use another --run",
            )
        return artifact

    def _partial(self, path: Path, spec: BuildSpec, force: bool) -> Path:
        """Returns the folder to build in, with the files of an earlier, killed build of the same identity."""
        partial = _partial_path(path, spec)
        with explained_os_errors(partial):
            if force and not self._is_another(path, spec):
                shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True, exist_ok=True)
        return partial

    @staticmethod
    def _is_another(path: Path, spec: BuildSpec) -> bool:
        try:
            return read_manifest(path).identity != spec.identity
        except InputError:
            return False

    def _draft(self, spec: BuildSpec) -> Manifest:
        return Manifest(
            kind=spec.kind,
            config=spec.config,
            seed=spec.seed,
            parents=tuple(_parent_ref(parent, self.root) for parent in spec.parents),
            model=spec.model,
            payload=(),
            created_at=now(),
            identity=spec.identity,
        )


def _partial_path(path: Path, spec: BuildSpec) -> Path:
    return path.with_name(f".{path.name}.partial-{spec.identity[:12]}")


def _parent_ref(parent: Artifact, root: Path) -> ParentRef:
    folder = root / parent.kind
    name = parent.path.name if parent.path.parent == folder else None
    return ParentRef(kind=parent.kind, name=name, identity=parent.identity)


def _changes(old: Manifest, spec: BuildSpec) -> list[str]:
    def facts(
        config: dict[str, Any], seed: int, fingerprint: str, parents: Iterable[tuple[str, str]], schema: int
    ) -> dict[str, Any]:
        named = {f"parent {kind}": identity[:12] for kind, identity in parents}
        return {
            **config,
            "seed": seed,
            "model fingerprint": fingerprint[:12],
            "schema_version": schema,
            **named,
        }

    before = facts(
        old.config,
        old.seed,
        old.model.fingerprint,
        ((p.kind, p.identity) for p in old.parents),
        old.schema_version,
    )
    after = facts(
        spec.config,
        spec.seed,
        spec.model.fingerprint,
        ((p.kind, p.identity) for p in spec.parents),
        SCHEMA_VERSION,
    )
    return differences(before, after)


def _title(kind: str, name: str | None) -> str:
    return f"'{kind}' artifact" if name is None else f"'{kind}' artifact {name}"


def _flags_of_name(kind: str, name: str) -> list[str]:
    """Returns the flags behind an artifact's name.

    Names are `w4a8`, `w4a8-openvino`, and for a bench `w8a8-w4a8-openvino-cpu`. That of an evaluation in other features
    than those of the model is `w4a8-openvino-inception`, and with a step cache `w4a8-taylorseer-3`.
    """
    cache = _CACHE.search(name) if kind == "evaluate" else None
    if cache is not None:
        setting = ":".join(part for part in cache.groups() if part is not None)
        return [*_flags_of_name(kind, name[: cache.start()]), "--cache", setting]
    features = [each for each in get_args(FeaturesName) if kind == "evaluate" and name.endswith(f"-{each}")]
    if features:
        return [*_flags_of_name(kind, name.removesuffix(f"-{features[0]}")), "--features", features[0]]
    parts = name.split("-")
    bits = list(takewhile(_is_bit_width, parts))
    rest = parts[len(bits) :]
    flags = ["--bits", ",".join(bits)] if bits else []
    if kind == "bench" and len(rest) > 1:
        return [*flags, "--engine", "-".join(rest[:-1]), "--device", rest[-1]]
    if rest == ["comfyui"]:
        return [*flags, "--format", "comfyui"]
    return [*flags, "--engine", "-".join(rest)] if bits and rest else flags


def _is_bit_width(text: str) -> bool:
    try:
        BitWidth.parse(text)
    except UsageError:
        return False
    return True
