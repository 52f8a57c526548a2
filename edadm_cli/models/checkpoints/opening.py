"""Makes a pipeline from one checkpoint file of any supported kind."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from edadm_cli.artifacts import file_sha256
from edadm_cli.errors import InputError
from edadm_cli.integrations.comfyui.reading import dequantized_state, is_quantized_state
from edadm_cli.models.architecture import load_architecture
from edadm_cli.models.checkpoints import beside, compvis, kinds, stable_diffusion
from edadm_cli.models.checkpoints.compvis_config import CONFIG_NAME
from edadm_cli.models.checkpoints.reading import SUFFIXES, read_checkpoint

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_CONVERSION_VERSION = 1
"""This number grows whenever a new version of the tool makes another pipeline from the same file."""


@dataclass(frozen=True)
class OpenedCheckpoint:
    """Holds the pipeline that was made from a checkpoint.

    Attributes:
        pipeline: The pipeline, on the CPU.
        fingerprint: The hash of the file and of the configuration beside it.
        known_as: The name of the known model that has the same architecture.
        remarks: Sentences that say what was assumed and which tensors were not used.
    """

    pipeline: DiffusionPipeline
    fingerprint: str
    known_as: str | None
    remarks: tuple[str, ...] = ()


def open_checkpoint(path: Path, dtype: torch.dtype) -> OpenedCheckpoint:
    """Converts a checkpoint file into a pipeline.

    Raises:
        InputError: The file is broken, contains code, or holds no supported model.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(
            f"{path} is a file, but not one of the kinds that are read; expected a diffusers folder, a checkpoint "
            f"({', '.join(SUFFIXES)}), a hub id or a known name.",
            hint="edadm models",
        )
    state = read_checkpoint(path)
    is_quantized = is_quantized_state(state)
    if is_quantized:
        state = dequantized_state(state, str(path))
    known_as, folder = stable_diffusion.known_as(state), beside.folder_beside(path)
    is_whole = kinds.has_autoencoder(state) and (known_as is not None or compvis.is_latent_diffusion(state))
    if not is_whole and folder is not None and not kinds.is_lora(state):
        completed = beside.complete(path, state, folder, dtype)
        return OpenedCheckpoint(
            completed.pipeline, _fingerprint(path, (completed.fingerprint,)), None, completed.remarks
        )
    if is_quantized:
        raise InputError(
            f"{path} holds a whole pipeline with weights of eight bits and scales; such weights are read only from a"
            " file that holds a denoiser alone.",
            hint="give --model a file in float16, or a diffusers folder",
        )
    if known_as is not None:
        model = stable_diffusion.describe(path, state, known_as, load_architecture(known_as))
        del state  # diffusers reads the file itself
        pipeline = stable_diffusion.convert(path, model.architecture, dtype)
        return OpenedCheckpoint(pipeline, _fingerprint(path, model.markers), known_as, model.remarks)
    if not is_whole:
        raise kinds.refusal(path, state)
    description = compvis.describe(path, state)
    pipeline = compvis.convert(path, state, description, dtype)
    return OpenedCheckpoint(pipeline, _fingerprint(path), description.known_as)


def _fingerprint(path: Path, others: tuple[str, ...] = ()) -> str:
    config = path.with_name(CONFIG_NAME)
    configuration = file_sha256(config) if config.is_file() else ""
    lines = [str(_CONVERSION_VERSION), file_sha256(path), configuration, *others]
    return sha256("\n".join(lines).encode()).hexdigest()
