"""Describes artifacts for people: their content, their lineage, and whether they are intact."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from edadm_cli.artifacts.artifact import has_manifest, open_artifact
from edadm_cli.artifacts.manifest import ModelRef, ParentRef, PayloadFile, read_manifest
from edadm_cli.artifacts.store import RunFolder, is_artifact_name
from edadm_cli.errors import InputError

KINDS = ("collect", "select", "sensitivity", "reconstruct", "export", "engine", "bench", "evaluate")


class InspectedArtifact(BaseModel):
    """One artifact as `edadm inspect --json` shows it; fields that a broken manifest lacks are null or empty."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    name: str | None
    path: str
    intact: bool
    problem: str | None = Field(description="one sentence; null when intact")
    hint: str | None = Field(description="the command that mends it")
    identity: str | None = None
    created_at: datetime | None = None
    edadm: str | None = Field(None, description="version of the program that made it")
    model: ModelRef | None = None
    seed: int | None = None
    config: dict[str, Any] = {}
    parents: tuple[ParentRef, ...] = ()
    environment: dict[str, Any] = {}
    payload: tuple[PayloadFile, ...] = ()


def run_of_artifact(path: Path) -> tuple[RunFolder | None, str, str | None]:
    """Returns the run folder, kind and name that an artifact's path implies.

    An artifact that was moved, or a copy of one beside it under a name that no artifact can have, has no run.
    """
    whole = path.resolve()
    if whole.parent.name in KINDS and is_artifact_name(whole.name):
        return RunFolder(_above(path, 2)), whole.parent.name, whole.name
    if whole.name in KINDS:
        return RunFolder(_above(path, 1)), whole.name, None
    return None, whole.name, None


def _above(path: Path, levels: int) -> Path:
    """Returns the folder `levels` above, as a part of the given path if that is long enough."""
    reaches = len(path.parts) >= levels and ".." not in path.parts
    return (path if reaches else path.resolve()).parents[levels - 1]


def inspect_artifact(path: Path) -> list[InspectedArtifact]:
    """Returns an artifact and then its ancestors in the run, nearest first."""
    run, kind, name = run_of_artifact(path)
    if run is None:
        return [_inspect(path, run, None, None)]
    inspected: list[InspectedArtifact] = []
    pending: list[tuple[str, str | None]] = [(kind, name)]
    while pending:
        kind, name = pending.pop(0)
        place = run.path(kind, name)
        if has_manifest(place) and all(entry.path != str(place) for entry in inspected):
            entry = _inspect(place, run, kind, name)
            inspected.append(entry)
            pending += [(parent.kind, parent.name) for parent in entry.parents]
    return inspected


def inspect_run(run: RunFolder) -> list[InspectedArtifact]:
    """Returns every artifact of a run, in the order of the chain.

    Raises:
        InputError: The folder is missing or has no artifact.
    """
    if not run.root.is_dir():
        raise InputError(f"There is no run folder {run.root}.", hint="edadm collect --model digits-sd")
    places: list[tuple[str, str | None]] = []
    for kind in KINDS:
        places += [(kind, None)] if run.has(kind) else [(kind, name) for name in run.names(kind)]
    if not places:
        raise InputError(f"{run.root} holds no artifact.", hint="edadm collect --model digits-sd")
    return [_inspect(run.path(kind, name), run, kind, name) for kind, name in places]


def _inspect(path: Path, run: RunFolder | None, kind: str | None, name: str | None) -> InspectedArtifact:
    try:
        manifest = read_manifest(path)
    except InputError as error:
        hint = error.hint or (run.command(kind, name, force=True) if run and kind else None)
        return InspectedArtifact(
            kind=kind or path.name, name=name, path=str(path), intact=False, problem=error.message, hint=hint
        )
    problem: InputError | None = None
    try:
        open_artifact(path, kind or manifest.kind)
        if run is not None:
            run.check_descent(manifest, name)
    except InputError as error:
        problem = error
    redo = run.command(manifest.kind, name, force=True) if run is not None else None
    return InspectedArtifact(
        kind=manifest.kind,
        name=name,
        path=str(path),
        intact=problem is None,
        problem=None if problem is None else problem.message,
        hint=None if problem is None else problem.hint or redo,
        identity=manifest.identity,
        created_at=manifest.created_at,
        edadm=manifest.tool.version,
        model=manifest.model,
        seed=manifest.seed,
        config=manifest.config,
        parents=manifest.parents,
        environment=manifest.environment,
        payload=manifest.payload,
    )
