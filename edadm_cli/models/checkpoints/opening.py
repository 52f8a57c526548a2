"""A pipeline from one checkpoint file, whatever kind it is."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from edadm_cli.artifacts import file_sha256
from edadm_cli.errors import InputError
from edadm_cli.models.architecture import load_architecture
from edadm_cli.models.checkpoints import compvis, stable_diffusion
from edadm_cli.models.checkpoints.compvis_config import CONFIG_NAME
from edadm_cli.models.checkpoints.reading import SUFFIXES, read_checkpoint

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_CONVERSION_VERSION = 1
"""Changes whenever the same file would give another pipeline."""


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint as a pipeline.

    Attributes:
        pipeline: The pipeline, on the CPU.
        fingerprint: Hash of the file and of the configuration beside it.
        known_as: Name of the known model that it is built like.
    """

    pipeline: DiffusionPipeline
    fingerprint: str
    known_as: str | None


def open_checkpoint(path: Path, dtype: torch.dtype) -> OpenedCheckpoint:
    """Convert a checkpoint file into a pipeline.

    Raises:
        InputError: The file is broken, carries code, or holds no model that is known here.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(
            f"{path} is a file; a diffusers folder, a checkpoint ({', '.join(SUFFIXES)}), a hub id or a known name "
            "was wanted.",
            hint="edadm models",
        )
    state = read_checkpoint(path)
    known_as = stable_diffusion.known_as(state)
    if known_as is not None:
        architecture = load_architecture(known_as)
        stable_diffusion.require_fit(path, state, architecture)
        del state  # diffusers reads the file itself
        pipeline = stable_diffusion.convert(path, architecture, dtype)
    elif compvis.is_latent_diffusion(state):
        model = compvis.describe(path, state)
        pipeline, known_as = compvis.convert(path, state, model, dtype), model.known_as
    else:
        raise InputError(
            f"{path} holds neither a Stable Diffusion (1, 2 or XL) nor a CompVis latent diffusion model; "
            f"its first tensor is '{min(state)}'.",
            hint="give --model a diffusers folder",
        )
    return OpenedCheckpoint(pipeline, _fingerprint(path), known_as)


def _fingerprint(path: Path) -> str:
    config = path.with_name(CONFIG_NAME)
    parts = [str(_CONVERSION_VERSION), file_sha256(path), file_sha256(config) if config.is_file() else ""]
    return sha256("\n".join(parts).encode()).hexdigest()
