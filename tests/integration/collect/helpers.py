"""The settings of small collections, and what they wrote."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edadm_cli.artifacts import Artifact
from edadm_cli.config import CollectConfig

CPU = torch.device("cpu")
TRAJECTORIES, STEPS = 10, 4
"""Trajectories of every run, and steps of the sampler; PNDM calls the denoiser once more."""


def config_of(folder: Path, prompts: Path | None, **changes: Any) -> CollectConfig:
    fields: dict[str, Any] = {
        "model": str(folder),
        "prompts": prompts if folder.name.startswith("tiny-sd") else None,
        "num_trajectories": TRAJECTORIES,
        "num_steps": STEPS,
        "batch_size": 4,
        "feature_batch": 6,
        "device": "cpu",
    }
    return CollectConfig(**{**fields, **changes})


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


def latents_of(artifact: Artifact) -> Tensor:
    names = sorted(e.path for e in artifact.manifest.payload if e.path.startswith("latents-"))
    return torch.cat([artifact.tensors(name)["latents"] for name in names], dim=1)
