"""One optimizer step of a unit: launched kernel by kernel on a CPU, replayed as one CUDA graph on a GPU.

Units are small, so on a GPU the time of a step is that of its few hundred launches; a graph makes them one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from edadm_cli.processes import Processes

_WARM_UP_STEPS = 3


@contextmanager
def repeatable_convolutions() -> Iterator[None]:
    """Has cuDNN use only algorithms that give the same bytes every time, so that a resume changes nothing on CUDA."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


class Optimization:
    """Adam with one step size per group, all decaying to zero along a cosine, or constant.

    Args:
        rates: Each parameter and the step it starts with.
        iterations: Length of the decay.
        decays: Whether the steps decay.
        device: On CUDA the optimizer keeps its state and step sizes there, so that a graph can hold it.
    """

    def __init__(
        self, rates: list[tuple[nn.Parameter, float]], iterations: int, device: torch.device, decays: bool = True
    ) -> None:
        self.capturable = device.type == "cuda"
        groups = [
            {"params": [param], "lr": torch.tensor(rate, device=device) if self.capturable else rate}
            for param, rate in rates
        ]
        self.adam = torch.optim.Adam(groups, capturable=self.capturable, fused=True)
        self._decays = decays
        self._rates, self._iterations, self._done = [rate for _, rate in rates], iterations, 0

    def set_rates(self, factor: float) -> None:
        """Sets every group's step to `factor` times its first one."""
        for group, rate in zip(self.adam.param_groups, self._rates, strict=True):
            if self.capturable:
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor

    def decay(self) -> None:
        """Sets the steps of the next iteration."""
        self.set_rates(0.5 * (1 + math.cos(math.pi * self._done / self._iterations)) if self._decays else 1.0)
        self._done += 1

    def params(self) -> list[nn.Parameter]:
        """Returns all that is learned."""
        return [param for group in self.adam.param_groups for param in group["params"]]

    def forget(self) -> None:
        """Zeroes the moments."""
        for state in self.adam.state.values():
            for value in state.values():
                value.zero_()


class Learner(Protocol):
    """What an optimizer step is taken for.

    Attributes:
        device: Where it computes.
        generator: The random generator of its masks, on that device.
        processes: Those that learn together.
    """

    device: torch.device
    generator: torch.Generator
    processes: Processes

    def loss(self) -> Tensor:
        """Returns this process's share of the loss on the chosen rows."""

    def after_step(self) -> None:
        """Does what the optimizer's change of the parameters asks for."""


def make_step(learner: Learner, optimization: Optimization) -> Callable[[], Tensor]:
    """Returns a function that takes one step on the learner's chosen rows and returns the loss before it."""
    alone = learner.processes.count == 1

    def compute() -> Tensor:
        loss = learner.loss()
        loss.backward()
        if alone:
            update()
        return loss.detach()

    def update() -> None:
        optimization.adam.step()
        learner.after_step()

    def average() -> None:
        """Losses are weighted by the rows of each process, so that the mean of the gradients is their sum."""
        for param in optimization.params():
            assert param.grad is not None
            learner.processes.sum(param.grad)
        update()

    def launch() -> Tensor:
        optimization.decay()
        optimization.adam.zero_grad(set_to_none=True)
        return compute()

    step = _captured(learner, optimization, compute) if optimization.capturable else launch
    if alone:
        return step

    def step_together() -> Tensor:
        loss = step()
        average()
        return loss

    return step_together


def _captured(learner: Learner, optimization: Optimization, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    stream = torch.cuda.Stream(learner.device)
    stream.wait_stream(torch.cuda.current_stream(learner.device))
    with torch.cuda.stream(stream):
        optimization.set_rates(0.0)  # warming up must not learn
        for _ in range(_WARM_UP_STEPS):
            optimization.adam.zero_grad(set_to_none=True)
            compute()
        optimization.forget()
    torch.cuda.current_stream(learner.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(learner.generator)
    optimization.adam.zero_grad(set_to_none=True)  # the graph then writes gradients instead of adding to them
    with torch.cuda.graph(graph):
        loss = compute()

    def replay() -> Tensor:
        optimization.decay()
        graph.replay()
        return loss

    return replay
