"""Opens and checks complete artifacts on disk, and reads their files by name."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edadm_cli.artifacts.files import explained_os_errors, file_sha256, in_threads, load_json
from edadm_cli.artifacts.manifest import MANIFEST_NAME, Manifest, PayloadFile, read_manifest
from edadm_cli.artifacts.tensors import load_tensors, read_tensor_header
from edadm_cli.errors import InputError, MachineError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Artifact:
    """A folder with a manifest whose identity and files were checked when it was opened."""

    path: Path
    manifest: Manifest
    remedy: str | None = None
    """The command that builds it again, if its run is known; it is the hint of errors about its files."""

    @property
    def identity(self) -> str:
        """Hash of everything that decides the content."""
        return self.manifest.identity

    @property
    def kind(self) -> str:
        """The stage that built it."""
        return self.manifest.kind

    def within(self, folder: str) -> Artifact:
        """Returns the part of the artifact that lies in one of its folders, with names as inside it; `""` is all of it.

        A model with several denoisers has such a part for every denoiser but the first.
        """
        if not folder:
            return self
        start = f"{folder}/"
        inside = [entry for entry in self.manifest.payload if entry.path.startswith(start)]
        payload = tuple(entry.model_copy(update={"path": entry.path.removeprefix(start)}) for entry in inside)
        manifest = self.manifest.model_copy(update={"payload": payload})
        return Artifact(self.path / folder, manifest, self.remedy)

    def file(self, name: str) -> Path:
        """Returns the path of one file of the payload.

        Raises:
            InputError: The artifact has no such file.
        """
        if all(entry.path != name for entry in self.manifest.payload):
            listed = ", ".join(entry.path for entry in self.manifest.payload) or "nothing"
            raise InputError(f"{self.path} has no file '{name}'; it has {listed}.", hint=self.remedy)
        return self.path / name

    def tensors(self, name: str, keys: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """Returns the tensors of one safetensors file, on the CPU."""
        return load_tensors(self.file(name), keys)

    def json(self, name: str) -> Any:
        """Returns the content of one JSON file."""
        return load_json(self.file(name))


def has_manifest(path: Path) -> bool:
    """Returns whether a folder claims to be complete; a manifest that is no regular file counts as a broken one.

    Raises:
        MachineError: This process may not look into the folder.
    """
    try:
        os.lstat(path / MANIFEST_NAME)
    except PermissionError as error:
        raise MachineError(f"{path}: permission is denied.") from error
    except (OSError, ValueError):
        return False
    return True


def open_artifact(path: Path, kind: str) -> Artifact:
    """Opens an artifact and checks its manifest, its identity, and the size and hash of each file.

    Raises:
        InputError: There is no artifact, it is of another kind, or one of its files was changed, lost or truncated.
    """
    if not has_manifest(path):
        raise InputError(f"There is no '{kind}' artifact at {path}.")
    manifest = read_manifest(path)
    if manifest.kind != kind:
        raise InputError(f"{path} is a '{manifest.kind}' artifact; a '{kind}' artifact was expected.")
    in_threads(lambda entry: check_file(path, entry), manifest.payload)
    return Artifact(path, manifest)


def check_file(folder: Path, entry: PayloadFile) -> None:
    """Compares one file with its entry in the manifest.

    Raises:
        InputError: The file is missing, or its size or hash differs.
    """
    path = folder / entry.path
    if not path.is_file():
        raise InputError(f"{path} is missing, though the manifest lists it.")
    with explained_os_errors(path):
        size = path.stat().st_size
        if size != entry.bytes:
            raise InputError(f"{path} has {size} bytes; the manifest says {entry.bytes}.")
        if file_sha256(path) != entry.sha256:
            raise InputError(f"{path} was changed after it was written: its hash differs from the manifest's.")
    if entry.tensors is not None and read_tensor_header(path) != entry.tensors:
        raise InputError(f"{path} does not hold the tensors that the manifest lists for it.")
