r"""The training loop of all emoji models: AdamW, averaged weights, several processes, and checkpoints to resume from.

Step $k$ of process $r$ draws all its random numbers from a generator seeded with $(\text{seed}, \text{stage}, k, r)$.
The learning rate rises over the first steps, stays constant, and falls linearly to zero over the last half of the
training. The length of the training is a number of steps or a time. The record holds the number of steps that were
taken, and `--steps` repeats a training with that number.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from edadm_cli.models.emoji.train.settings import TrainSettings

_SYNC_STEPS = 10
_LOG_SECONDS = 10.0
_SAVE_SECONDS = 60.0
_MAX_GRADIENT_NORM = 1.0


class Task(Protocol):
    """Says what to optimise: `draw` makes all random choices, and `loss` is a fixed function of what `draw` returns."""

    @property
    def module(self) -> nn.Module:
        """Returns the module that is optimised."""
        ...

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Returns the inputs of `loss` in one step with `count` pictures."""
        ...

    def loss(self, *inputs: Tensor) -> Tensor:
        """Returns the scalar loss."""
        ...


@dataclass(frozen=True)
class Schedule:
    """Says how fast to train; `average_decay` is the decay of the averaged weights."""

    batch_size: int
    learning_rate: float
    warmup_steps: int = 300
    constant_share: float = 0.5
    weight_decay: float = 0.01
    average_decay: float = 0.9995

    def rate_at(self, step: int, progress: float) -> float:
        """Returns the learning rate at a step that comes after a share `progress` of the training, from 0 to 1."""
        left = min(1.0, max(0.0, (1 - progress) / (1 - self.constant_share)))
        return self.learning_rate * min((step + 1) / self.warmup_steps, left)


@dataclass(frozen=True)
class FitResult:
    """Holds what a training record says about an optimisation."""

    done: bool
    steps: int
    loss: float
    seconds: float
    curve: list[tuple[int, float, float]]


class _Run:
    """Holds the state of one optimisation, and reads and writes its checkpoint."""

    def __init__(self, task: Task, schedule: Schedule, settings: TrainSettings, name: str) -> None:
        self.task, self.schedule, self.settings, self.name = task, schedule, settings, name
        self.batch = (settings.batch_size or schedule.batch_size) // settings.world
        self.parameters = [value for value in task.module.parameters() if value.requires_grad]
        self.average = [value.detach().clone() for value in self.parameters]
        cuda = settings.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=schedule.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=schedule.weight_decay,
            fused=cuda,
        )
        self.context: Any = torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext()
        self.step, self.seconds, self.progress = 0, 0.0, 0.0
        self.loss = torch.zeros((), device=settings.device)
        self.curve: list[tuple[int, float, float]] = []
        self.path = settings.out / "checkpoints" / f"{name}.pt"

    def restore(self) -> None:
        """Continues from the checkpoint, if there is one."""
        if not self.path.is_file():
            return
        saved: dict[str, Any] = torch.load(self.path, map_location=self.settings.device, weights_only=True)
        self.task.module.load_state_dict(saved["module"])
        torch._foreach_copy_(self.average, saved["average"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.seconds, self.loss = saved["step"], saved["seconds"], saved["loss"]
        self.curve = [tuple(row) for row in saved["curve"]]

    def save(self, elapsed: float) -> None:
        """Writes the checkpoint beside the previous one, and then replaces that one.

        `elapsed` is the time that this call has trained, in seconds.
        """
        if self.settings.rank:
            return
        saved = {
            "module": self.task.module.state_dict(), "average": self.average, "optimizer": self.optimizer.state_dict(),
            "step": self.step, "seconds": self.seconds + elapsed, "loss": self.loss, "curve": self.curve,
        }  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        torch.save(saved, partial)
        partial.replace(self.path)

    def advance(self) -> None:
        """Takes one optimiser step."""
        settings = self.settings
        generator = settings.generator(self.name, "step", self.step, settings.rank)
        inputs = self.task.draw(self.batch, generator)
        self.optimizer.zero_grad(set_to_none=True)
        with self.context:
            loss = self.task.loss(*inputs)
        loss.backward()
        if settings.world > 1:
            self._average_gradients()
        nn.utils.clip_grad_norm_(self.parameters, _MAX_GRADIENT_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate_at(self.step, self.progress)
        self.optimizer.step()
        decay = min(self.schedule.average_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [value.detach() for value in self.parameters], 1 - decay)
        self.loss = loss.detach() if self.step == 0 else self.loss.lerp(loss.detach(), 0.01)
        self.step += 1

    def _average_gradients(self) -> None:
        gradients = [value.grad for value in self.parameters if value.grad is not None]
        flat = torch.cat([value.flatten() for value in gradients])
        dist.all_reduce(flat)
        parts = (flat / self.settings.world).split([value.numel() for value in gradients])
        torch._foreach_copy_(gradients, [part.view_as(value) for part, value in zip(parts, gradients, strict=True)])

    def measure_progress(self, elapsed: float) -> bool:
        """Makes all processes agree how far the training is, and returns whether to stop now."""
        settings = self.settings
        if settings.steps is not None:
            progress = self.step / settings.steps
        else:
            total = self.seconds + (settings.stop_after or 0.0) if settings.finish else settings.seconds
            progress = (self.seconds + elapsed) / max(1e-9, total or 0.0)
        stop = settings.stop_after is not None and elapsed >= settings.stop_after
        state = torch.tensor([progress, float(stop)], device=settings.device, dtype=torch.float64)
        if settings.world > 1:
            dist.broadcast(state, 0)
        self.progress = min(1.0, float(state[0]))
        return bool(state[1]) or self.progress >= 1

    def log(self, elapsed: float) -> None:
        """Prints and records how far the optimisation is."""
        if self.settings.rank:
            return
        seconds, loss = self.seconds + elapsed, self.loss.item()
        self.curve.append((self.step, round(seconds, 1), round(loss, 6)))
        line = {"stage": self.name, "step": self.step, "seconds": round(seconds, 1), "loss": round(loss, 6)}
        line["pictures"] = self.step * self.batch * self.settings.world
        print(json.dumps(line), file=sys.stderr, flush=True)


def fit(task: Task, schedule: Schedule, settings: TrainSettings, name: str) -> FitResult:
    """Trains until the steps or the time are used up, or until this call must stop.

    At the end the module holds the averaged weights. The checkpoint holds both the averaged and the last weights.
    """
    run = _Run(task, schedule, settings, name)
    run.restore()
    start = logged = saved = time.monotonic()
    stopped = run.measure_progress(0.0)
    while not stopped:
        run.advance()
        if run.step % _SYNC_STEPS and settings.steps is None:
            continue
        now = time.monotonic()
        stopped = run.measure_progress(now - start)
        if now - logged > _LOG_SECONDS or stopped:
            run.log(now - start)
            logged = now
        if now - saved > _SAVE_SECONDS:
            run.save(now - start)
            saved = now
    elapsed = time.monotonic() - start
    run.save(elapsed)
    run.seconds += elapsed
    torch._foreach_copy_([value.data for value in run.parameters], run.average)
    return FitResult(run.progress >= 1, run.step, run.loss.item(), run.seconds, run.curve)
