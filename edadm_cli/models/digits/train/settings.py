"""The settings of one training run, and the seeds and folders that follow from them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class TrainSettings:
    """Holds the settings that all stages share.

    Attributes:
        out: The folder that receives `weights/` (what ships), `samples/` (image grids) and `checkpoints/`.
        device: The device that trains and measures.
        seed: The seed from which all other seeds are derived.
        epochs_scale: A factor on every stage's number of epochs.
        num_images: The number of images that are sampled from each model for its measurements.
        checkpoint_seconds: The time between two checkpoints, in seconds.
        cuda_graphs: Whether forward and backward passes on CUDA are recorded once and replayed.
        force: Whether to train again what was trained with other settings.
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
        """Returns the folder of the files that ship."""
        return self.out / "weights"

    @property
    def samples(self) -> Path:
        """Returns the folder of image grids."""
        return self.out / "samples"

    @property
    def checkpoints(self) -> Path:
        """Returns the folder of the checkpoints of unfinished stages."""
        return self.out / "checkpoints"

    def generator(self, *parts: str | int, device: str | torch.device | None = None) -> torch.Generator:
        """Returns a generator for one named piece of work, on the run's device unless `device` is given."""
        generator = torch.Generator(device=self.device if device is None else device)
        return generator.manual_seed(seed_of(self.seed, *parts))


def seed_of(seed: int, *parts: str | int) -> int:
    """Returns the seed of one piece of work (a stage, a step, an image), derived from the run's seed and its name."""
    digest = hashlib.sha256("/".join(map(str, (seed, *parts))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
