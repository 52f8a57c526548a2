"""The settings of one training run, and the folders and generators that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from edadm_cli.models.digits.train.settings import seed_of


@dataclass(frozen=True)
class TrainSettings:
    """Holds the settings that all stages share.

    Attributes:
        data: The folder that `prepare` wrote.
        out: The folder that receives `weights/`, `samples/`, `checkpoints/` and `logs/`.
        device: The device that trains and measures.
        rank: The index of this process among those that train one network together.
        world: The number of those processes.
        seed: The seed from which all other seeds are derived.
        seconds: The time that a stage may train in all its calls together, in seconds. It decides the learning rates.
        steps: The number of steps, in place of a time; it repeats a recorded training.
        stop_after: The time in seconds after which this call stops and writes a checkpoint; `None` sets no limit.
        finish: Whether the stage's training ends when this call stops.
        wait: Whether to wait for the stages that this stage needs.
        batch_size: The number of pictures per step in all processes together; `None` takes the stage's own number.
        limit: The number of pictures to use, for tests; `None` uses all.
        small: Whether to use tiny networks, for tests.
        compile: Whether to compile the network with `torch.compile`.
        trained: The folder of the weights that are measured or shown; `None` takes those that `out` receives.
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
    trained: Path | None = None

    @property
    def weights(self) -> Path:
        """Returns the folder of the files that ship."""
        return self.out / "weights" if self.trained is None else self.trained

    def generator(self, *parts: str | int, device: str | torch.device | None = None) -> torch.Generator:
        """Returns a generator for one named piece of work, on the run's device unless another is given."""
        generator = torch.Generator(device=self.device if device is None else device)
        return generator.manual_seed(seed_of(self.seed, *parts))
