"""Identifies networks by their weights: metrics in their features are comparable only if these are equal."""

from __future__ import annotations

import struct
from hashlib import sha256
from pathlib import Path

from edadm_cli.artifacts import file_sha256
from edadm_cli.artifacts.tensors import read_tensor_places
from edadm_cli.errors import InputError
from edadm_cli.evaluate.real import files_digest
from edadm_cli.models.digits import data as digits
from edadm_cli.models.emoji import data as emoji

INCEPTION_VERSION = "2015-12-05-6726825d"
"""Date and hash of the Inception weights that torch-fidelity downloads."""


def digits_digest(root: Path = digits.WEIGHTS) -> str:
    """Returns the hash of the digit classifier's names and float32 weights, without loading the classifier.

    Its file holds them in half precision.

    Raises:
        InputError: The file is missing or broken.
    """
    path, digest = digits.model_folder("classifier", root) / digits.CLASSIFIER_FILE, sha256()
    places = read_tensor_places(path)
    content = path.read_bytes()
    for name, place in sorted(places.items()):
        stored = content[place.offset : place.offset + place.size]
        values = [value for (value,) in struct.iter_unpack("<e", stored)]
        digest.update(name.encode() + struct.pack(f"<{len(values)}f", *values))
    return digest.hexdigest()


def emoji_digest() -> str:
    """Returns the hash of the files of both encoders of the emoji models."""
    shared = emoji.model_folder("shared")
    parts = [(name, file_sha256(shared / name / "model.safetensors")) for name in ("picture_encoder", "text_encoder")]
    return files_digest(parts)


def inception_digest(weights: Path | None) -> str:
    """Returns the version of torch-fidelity's Inception weights, or the hash of a file of weights.

    Raises:
        InputError: There is no such file.
    """
    if weights is None:
        return INCEPTION_VERSION
    require_weights(weights)
    return file_sha256(weights)


def require_weights(path: Path) -> None:
    """Checks that there is a file of Inception weights.

    Raises:
        InputError: There is none.
    """
    if not path.is_file():
        raise InputError(f"The Inception weights were expected in {path}, but there is no such file.")
