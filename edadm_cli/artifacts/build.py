"""Builds an artifact in a partial folder, and publishes it with one rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edadm_cli.artifacts.artifact import Artifact, has_manifest, open_artifact
from edadm_cli.artifacts.files import atomic_path, explained_os_errors, sync
from edadm_cli.artifacts.locks import write_lock
from edadm_cli.artifacts.manifest import (
    MANIFEST_NAME,
    Manifest,
    describe_file,
    describe_payload,
    environment_facts,
    now,
    read_manifest,
    remove_temporary_files,
    set_usual_modes,
    write_manifest,
)
from edadm_cli.artifacts.peak import peak_memory
from edadm_cli.errors import InputError


@dataclass
class Build:
    """A folder to fill and to commit; or, if `artifact` is set, an artifact that is up to date.

    Args:
        path: The folder to write into; files of a killed build with the same identity are still there.
        target: The final path of the artifact.
        manifest: The manifest so far, without its payload.
        artifact: The finished artifact, if it is up to date.
    """

    path: Path
    target: Path
    manifest: Manifest
    artifact: Artifact | None = None

    @property
    def up_to_date(self) -> bool:
        """Whether the artifact is complete and nothing is to be built."""
        return self.artifact is not None

    def finished(self) -> Artifact:
        """Returns the artifact once it is committed, by this or another process.

        Raises:
            InputError: The artifact is missing.
        """
        return self.artifact or Artifact(self.target, read_manifest(self.target))

    def discard(self, names: Iterable[str]) -> None:
        """Removes scratch files or folders from the partial folder; absent ones are passed over."""
        with explained_os_errors(self.path):
            for name in names:
                path = self.path / name
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)

    def commit(self, environment: Mapping[str, Any] | None = None, ignore: Iterable[str] = ()) -> Artifact:
        """Hashes and syncs every file, writes the manifest, and renames the folder into its place.

        Args:
            environment: Facts for the record (device, versions) that do not decide the content.
            ignore: Shell patterns of files that are kept but are not part of the payload.

        Raises:
            MachineError: The disk is full or permission is denied.
            RuntimeError: The artifact is up to date or was committed already.
        """
        if self.artifact is not None:
            raise RuntimeError(f"{self.target} is complete; there is nothing to commit")
        with explained_os_errors(self.target):
            remove_temporary_files(self.path)
            set_usual_modes(self.path)
            (self.path / MANIFEST_NAME).unlink(missing_ok=True)
            manifest = self.manifest.model_copy(
                update={
                    "payload": describe_payload(self.path, ignore),
                    "environment": {**environment_facts(), **peak_memory(), **(environment or {})},
                    "created_at": now(),
                }
            )
            write_manifest(self.path, manifest)
            _move_into_place(self.path, self.target)
        self.artifact = Artifact(self.target, manifest)
        return self.artifact


def replace_files(artifact: Artifact, contents: Mapping[str, bytes]) -> Artifact:
    """Writes files of a complete artifact anew that say something about it and decide nothing, such as a model card.

    A file is not in the manifest while it is being written, so that the artifact is whole whenever this is killed.

    Args:
        artifact: The artifact; its identity stays the same.
        contents: The bytes of each file, by its name inside the artifact.

    Raises:
        InputError: Another process uses the artifact.
        MachineError: The disk is full or permission is denied.
    """
    with write_lock(artifact.path), explained_os_errors(artifact.path):
        manifest = read_manifest(artifact.path)
        others = tuple(entry for entry in manifest.payload if entry.path not in contents)
        write_manifest(artifact.path, manifest.model_copy(update={"payload": others}))
        for name, content in contents.items():
            with atomic_path(artifact.path / name) as temporary:
                temporary.write_bytes(content)
        added = (describe_file(artifact.path / name, name) for name in contents)
        payload = tuple(sorted((*others, *added), key=lambda entry: entry.path))
        manifest = manifest.model_copy(update={"payload": payload})
        write_manifest(artifact.path, manifest)
    return Artifact(artifact.path, manifest, artifact.remedy)


def adopt(partial: Path, target: Path, kind: str) -> Build | None:
    """Finishes a build that was killed between its manifest and its rename; `None` if there is none."""
    if not has_manifest(partial):
        return None
    try:
        manifest = open_artifact(partial, kind).manifest
    except InputError:
        (partial / MANIFEST_NAME).unlink()
        return None
    with explained_os_errors(target):
        _move_into_place(partial, target)
    return Build(path=target, target=target, manifest=manifest, artifact=Artifact(target, manifest))


def recover(target: Path) -> None:
    """Repairs a commit that was killed while replacing an artifact: without a new one, the old one is restored."""
    for folder in target.parent.glob(f".{target.name}.replaced-*"):
        if target.exists() or not has_manifest(folder):
            shutil.rmtree(folder)
        else:
            os.rename(folder, target)


def _move_into_place(partial: Path, target: Path) -> None:
    """Renames the folder; an old artifact is moved aside first, and removed later with all other partial builds."""
    aside = target.with_name(f".{target.name}.replaced-{os.getpid()}")
    if has_manifest(target):
        os.rename(target, aside)
    os.rename(partial, target)
    sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)
    for other in target.parent.glob(f".{target.name}.partial-*"):
        shutil.rmtree(other, ignore_errors=True)
