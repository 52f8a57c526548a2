"""The manifest: the kind and settings of an artifact, its parents, and the hash of every file in it."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from edadm_cli.artifacts.files import (
    TEMPORARY,
    file_sha256,
    in_threads,
    is_temporary,
    read_text,
    save_json,
    sync,
    usual_mode,
)
from edadm_cli.artifacts.identity import SCHEMA_VERSION, compute_identity
from edadm_cli.artifacts.json_text import parse_json
from edadm_cli.artifacts.tensors import TensorInfo, read_tensor_header
from edadm_cli.errors import InputError, explain_field
from edadm_cli.version import __version__

MANIFEST_NAME = "manifest.json"
_REMEMBERED_CHARACTERS = 2**21
"""Size of the largest manifest that is remembered once it is checked."""
_PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "numpy")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


ArtifactName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
"""Characters of an artifact's kind and name, which are names of folders."""


class ModelRef(_Frozen):
    """The model of an artifact: the name that the user gave, its revision, and the hash of its files."""

    id: str
    revision: str | None = None
    fingerprint: str


class ParentRef(_Frozen):
    """An artifact that was read; `name` is the bit width if a run can have several of the kind."""

    kind: ArtifactName
    name: ArtifactName | None = None
    identity: str


class PayloadFile(_Frozen):
    """One file of an artifact, by its path inside the folder."""

    path: str
    sha256: str
    bytes: int = Field(ge=0)
    tensors: dict[str, TensorInfo] | None = Field(None, description="contents of a safetensors file; null for others")

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, value: str) -> str:
        path = PurePosixPath(value)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in value:
            raise ValueError("a payload path must be a name inside the artifact's folder")
        return value


class Tool(_Frozen):
    """The program that built the artifact."""

    name: str = "edadm"
    version: str = __version__


class Manifest(_Frozen):
    """`manifest.json`, which is written last; its presence means that the artifact is complete."""

    schema_version: int = SCHEMA_VERSION
    kind: ArtifactName
    tool: Tool = Tool()
    config: dict[str, Any]
    seed: int
    parents: tuple[ParentRef, ...] = ()
    model: ModelRef
    payload: tuple[PayloadFile, ...]
    environment: dict[str, Any] = {}
    created_at: datetime
    identity: str

    def expected_identity(self) -> str:
        """Returns the identity that follows from the manifest's fields."""
        return compute_identity(
            schema_version=self.schema_version,
            kind=self.kind,
            config=self.config,
            seed=self.seed,
            parents=[(parent.kind, parent.identity) for parent in self.parents],
            fingerprint=self.model.fingerprint,
        )


def read_manifest(folder: Path) -> Manifest:
    """Reads `manifest.json` and checks that its identity follows from its fields.

    Raises:
        InputError: The manifest is missing, does not parse, has another schema version, or was changed by hand.
    """
    path = folder / MANIFEST_NAME
    text = read_text(path)
    parse = _parse if len(text) <= _REMEMBERED_CHARACTERS else _parse.__wrapped__
    return parse(text, str(path))


@lru_cache(maxsize=16)
def _parse(text: str, path: str) -> Manifest:
    """Returns the manifest of a text. Results are remembered: a chain reads its first manifests again and again."""
    content = parse_json(text, path)
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version is not None and version != SCHEMA_VERSION:
        raise InputError(
            f"{path} has schema version {str(version)[:40]}; this edadm {__version__} reads {SCHEMA_VERSION}."
        )
    try:
        manifest = Manifest.model_validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise InputError(f"{path} is not a manifest of edadm: {where[:200]}: {explain_field(first)}.") from error
    if manifest.identity != manifest.expected_identity():
        raise InputError(
            f"{path} was changed after it was written: its identity is {manifest.identity[:12]}, "
            f"its fields give {manifest.expected_identity()[:12]}."
        )
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `manifest.json`, whole or not at all."""
    save_json(folder / MANIFEST_NAME, manifest.model_dump(mode="json"))


def describe_payload(folder: Path, ignore: Iterable[str] = ()) -> tuple[PayloadFile, ...]:
    """Hashes and syncs every file under a folder, except the manifest.

    Args:
        folder: The artifact's folder.
        ignore: Shell patterns over paths inside the folder; matching files are left out of the payload.
    """
    patterns = tuple(ignore)
    names = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            sync(path)
        elif name != MANIFEST_NAME and not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            names.append(name)
    return tuple(in_threads(lambda name: describe_file(folder / name, name), names))


def remove_temporary_files(folder: Path) -> None:
    """Removes the temporary files of killed writes."""
    for path in list(folder.rglob("*")):
        if path.is_file() and is_temporary(path):
            path.unlink()


def set_usual_modes(folder: Path) -> None:
    """Gives every file the mode of the user's umask, since some libraries write files for the owner only."""
    probe = folder / f".mode{TEMPORARY}"
    mode = usual_mode(probe)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def environment_facts() -> dict[str, str]:
    """Returns the versions and the platform, for the record; no part of the identity."""
    facts = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return facts


def now() -> datetime:
    """Returns the present time in UTC, to the second."""
    return datetime.now(UTC).replace(microsecond=0)


def describe_file(path: Path, name: str) -> PayloadFile:
    """Hashes and syncs one file, which has the given name inside its artifact."""
    sync(path)
    tensors = read_tensor_header(path) if path.suffix == ".safetensors" else None
    return PayloadFile(path=name, sha256=file_sha256(path), bytes=path.stat().st_size, tensors=tensors)
