"""What one training run was asked to do, and the seeds and folders that follow from it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class TrainSettings:
    """Settings that all stages share.

    Attributes:
        out: Folder that receives `weights/` (what ships), `samples/` (image grids) and `checkpoints/`.
        device: Where to train and to measure.
        seed: Root of every random number.
        epochs_scale: Factor on every stage's number of epochs.
        num_images: Images sampled from each model for its measurements.
        checkpoint_seconds: Time between two checkpoints.
        cuda_graphs: Record forward and backward once on CUDA and replay them.
        force: Train again what was trained with other settings.
    """

    out: Path
    device: torch.device
    seed: int = 0
    epochs_scale: float = 1.0
    num_images: int = 2000
    checkpoint_seconds: float = 30.0
    cuda_graphs: bool = True
    force: bool = False

    @property
    def weights(self) -> Path:
        """Folder of what ships."""
        return self.out / "weights"

    @property
    def samples(self) -> Path:
        """Folder of image grids."""
        return self.out / "samples"

    @property
    def checkpoints(self) -> Path:
        """Folder of unfinished stages."""
        return self.out / "checkpoints"

    def generator(self, *parts: str | int, device: str | torch.device | None = None) -> torch.Generator:
        """Returns a generator for one named piece of work, on the run's device unless told otherwise."""
        generator = torch.Generator(device=self.device if device is None else device)
        return generator.manual_seed(seed_of(self.seed, *parts))


def seed_of(seed: int, *parts: str | int) -> int:
    """Derives the seed of one piece of work (a stage, a step, an image) from the run's seed and its name."""
    digest = hashlib.sha256("/".join(map(str, (seed, *parts))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
