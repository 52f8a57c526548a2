r"""The training loop of all digits models: AdamW, linear decay, averaged weights, and checkpoints to resume from.

Step $k$ draws all its random numbers from a generator seeded with $(\text{seed}, \text{stage}, k)$. The order of the
images in epoch $e$ comes from a generator seeded with $(\text{seed}, \text{stage}, e)$. A resumed run therefore needs
no generator state, and continues exactly as an uninterrupted one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from edadm_cli.errors import InputError
from edadm_cli.models.digits.train.settings import TrainSettings

_LOG_SECONDS = 10.0
_LOSS_MEMORY = 0.99
_MAX_GRADIENT_NORM = 1.0


class Task(Protocol):
    """Says what to optimise: `draw` makes all random choices, and `loss` is a fixed function of what `draw` returns."""

    @property
    def module(self) -> nn.Module:
        """Returns the module that is optimised."""
        ...

    def draw(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Returns the inputs of `loss` in one step, for the training images with the indices `index`."""
        ...

    def loss(self, *inputs: Tensor) -> Tensor:
        """Returns the scalar loss."""
        ...


@dataclass(frozen=True)
class Schedule:
    """Says how long and how fast to train; `average_decay` is the decay of the averaged weights."""

    epochs: float
    batch_size: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float = 0.01
    average_decay: float = 0.999

    def num_steps(self, num_samples: int) -> int:
        """Returns the number of optimiser steps; a batch may contain the end of one epoch and the start of the next."""
        return max(1, round(self.epochs * num_samples / self.batch_size))

    def rate_at(self, step: int, num_steps: int) -> float:
        """Returns the learning rate of a step: linear warm-up, then linear decay to zero."""
        warmup = max(1, min(self.warmup_steps, num_steps // 10))
        return self.learning_rate * min((step + 1) / warmup, (num_steps - step) / max(1, num_steps - warmup), 1.0)


@dataclass(frozen=True)
class FitResult:
    """Holds what a training record says about an optimisation."""

    steps: int
    final_loss: float
    seconds: float


class _Shuffler:
    """Yields image indices without end: one seeded permutation after the other."""

    def __init__(self, num_samples: int, settings: TrainSettings, name: str) -> None:
        self._num_samples, self._settings, self._name = num_samples, settings, name
        self._orders: dict[int, Tensor] = {}

    def batch(self, step: int, batch_size: int) -> Tensor:
        """Returns the indices of a step's batch, on the run's device."""
        epoch, start = divmod(step * batch_size, self._num_samples)
        parts: list[Tensor] = []
        missing = batch_size
        while missing:
            parts.append(self._order(epoch)[start : start + missing])
            missing -= len(parts[-1])
            epoch, start = epoch + 1, 0
        return torch.cat(parts)

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            generator = self._settings.generator(self._name, "epoch", epoch, device="cpu")
            order = torch.randperm(self._num_samples, generator=generator).to(self._settings.device)
            self._orders = {known: kept for known, kept in self._orders.items() if known == epoch - 1}
            self._orders[epoch] = order
        return self._orders[epoch]


class _RecordedBackward:
    """Replays the forward and backward pass of a task as one CUDA graph, since kernel launches limit tiny models."""

    def __init__(self, task: Task, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = tuple(value.clone() for value in inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                task.loss(*self._inputs).backward()
        torch.cuda.current_stream().wait_stream(stream)
        task.module.zero_grad(set_to_none=True)  # the recording then writes gradients instead of adding to them
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss = task.loss(*self._inputs)
            self._loss.backward()

    def __call__(self, inputs: tuple[Tensor, ...]) -> Tensor:
        for kept, value in zip(self._inputs, inputs, strict=True):
            kept.copy_(value)
        self._graph.replay()
        return self._loss.detach()


class _Run:
    """Holds the state of one optimisation, and reads and writes its checkpoint."""

    def __init__(self, task: Task, schedule: Schedule, num_samples: int, settings: TrainSettings, name: str) -> None:
        self.task, self.schedule, self.settings, self.name = task, schedule, settings, name
        self.num_steps = schedule.num_steps(num_samples)
        self.shuffler = _Shuffler(num_samples, settings, name)
        self.parameters: list[Tensor] = [value for value in task.module.parameters() if value.requires_grad]
        self.average = [value.detach().clone() for value in self.parameters]
        cuda = settings.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=schedule.learning_rate, weight_decay=schedule.weight_decay, fused=cuda
        )
        self.step, self.seconds = 0, 0.0
        self.loss = torch.zeros((), device=settings.device)
        self.recorded: _RecordedBackward | None = None
        self.recording = cuda and settings.cuda_graphs
        self.path = settings.checkpoints / f"{name}.pt"
        identity = asdict(schedule) | {"name": name, "seed": settings.seed, "num_samples": num_samples}
        identity["parameters"] = sum(value.numel() for value in self.parameters)
        self.identity = json.dumps(identity, sort_keys=True)

    def restore(self) -> None:
        """Continues from the checkpoint, if there is one."""
        if not self.path.is_file():
            return
        saved: dict[str, Any] = torch.load(self.path, map_location=self.settings.device, weights_only=True)
        if saved["identity"] != self.identity:
            raise InputError(
                f"A checkpoint of {self.identity} was expected in {self.path}; it has {saved['identity']}.",
                hint=f"rm {self.path}",
            )
        self.task.module.load_state_dict(saved["module"])
        torch._foreach_copy_(self.average, saved["average"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.seconds, self.loss = saved["step"], saved["seconds"], saved["loss"]

    def save(self) -> None:
        """Writes the checkpoint beside the previous one, and then replaces that one."""
        saved = {
            "identity": self.identity, "module": self.task.module.state_dict(), "average": self.average,
            "optimizer": self.optimizer.state_dict(), "step": self.step, "seconds": self.seconds,
            "loss": self.loss,
        }  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(f".partial-{os.getpid()}")
        with partial.open("wb") as file:
            torch.save(saved, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)

    def advance(self) -> None:
        """Takes one optimiser step."""
        index = self.shuffler.batch(self.step, self.schedule.batch_size)
        inputs = self.task.draw(index, self.settings.generator(self.name, "step", self.step))
        loss = self._backward(inputs)
        nn.utils.clip_grad_norm_(self.parameters, _MAX_GRADIENT_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate_at(self.step, self.num_steps)
        self.optimizer.step()
        decay = min(self.schedule.average_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [value.detach() for value in self.parameters], 1 - decay)
        self.loss = loss.clone() if self.step == 0 else self.loss.lerp(loss, 1 - _LOSS_MEMORY)
        self.step += 1

    def _backward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        if not self.recording:
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.task.loss(*inputs)
            loss.backward()
            return loss.detach()
        if self.recorded is None:
            self.recorded = _RecordedBackward(self.task, inputs)
        return self.recorded(inputs)

    def log(self) -> None:
        """Prints how far the optimisation is."""
        progress = f"step {self.step}/{self.num_steps}, loss {self.loss.item():.5f}, {self.seconds:.0f} s"
        print(f"{self.name}: {progress}", file=sys.stderr, flush=True)


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Lets CUDA round the factors of float32 products to TF32, for training only."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = False


def fit(task: Task, schedule: Schedule, num_samples: int, settings: TrainSettings, name: str) -> FitResult:
    """Optimises `task.module`, which holds the averaged weights afterwards.

    Raises:
        InputError: The checkpoint in the output folder was written with other settings.
    """
    run = _Run(task, schedule, num_samples, settings, name)
    run.restore()
    task.module.train()
    with tensor_cores() if settings.device.type == "cuda" else nullcontext():
        _advance_to_end(run)
    with torch.no_grad():
        torch._foreach_copy_(run.parameters, run.average)
    task.module.zero_grad(set_to_none=True)
    task.module.eval()
    return FitResult(run.num_steps, run.loss.item(), run.seconds)


def _advance_to_end(run: _Run) -> None:
    before = run.seconds
    start = logged = saved = time.monotonic()
    while run.step < run.num_steps:
        run.advance()
        now = time.monotonic()
        run.seconds = before + now - start
        if now - saved > run.settings.checkpoint_seconds:
            run.save()
            saved = now
        if now - logged > _LOG_SECONDS or run.step == run.num_steps:
            run.log()
            logged = now
    run.save()


def discard_checkpoint(settings: TrainSettings, name: str) -> None:
    """Removes a stage's checkpoint, which is not needed once the weights and the record are written."""
    (settings.checkpoints / f"{name}.pt").unlink(missing_ok=True)
