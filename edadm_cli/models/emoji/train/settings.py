"""What one training run is asked to do, and the folders and generators that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from edadm_cli.models.digits.train.settings import seed_of


@dataclass(frozen=True)
class TrainSettings:
    """Settings that all stages share.

    Attributes:
        data: Folder that `prepare` wrote.
        out: Folder that receives `weights/`, `samples/`, `checkpoints/` and `logs/`.
        device: Where to train and to measure.
        rank: Number of this process among those that train one network together.
        world: Number of those processes.
        seed: Root of every random number.
        seconds: Time that a stage may train, all calls together; decides its learning rates.
        steps: Number of steps instead of a time, which repeats a recorded training.
        stop_after: Time after which this call stops and leaves a checkpoint; `None` for no limit.
        finish: Let the stage's training end when this call stops.
        wait: Wait for the stages that the stage needs.
        batch_size: Pictures per step, all processes together; `None` for the stage's own.
        limit: Number of pictures to use, for tests; `None` for all.
        small: Use tiny networks, for tests.
        compile: Compile the network with torch.compile.
    """

    data: Path
    out: Path
    device: torch.device
    rank: int = 0
    world: int = 1
    seed: int = 0
    seconds: float | None = None
    steps: int | None = None
    stop_after: float | None = None
    finish: bool = False
    wait: bool = False
    batch_size: int | None = None
    limit: int | None = None
    small: bool = False
    compile: bool = False

    @property
    def weights(self) -> Path:
        """Folder of what ships."""
        return self.out / "weights"

    def generator(self, *parts: str | int, device: str | torch.device | None = None) -> torch.Generator:
        """Returns a generator for one named piece of work, on the run's device unless another is given."""
        generator = torch.Generator(device=self.device if device is None else device)
        return generator.manual_seed(seed_of(self.seed, *parts))
