"""Takes the optimizer steps of a unit: kernel by kernel on a CPU, as one replayed CUDA graph on a GPU.

Units are small, so that a few hundred kernel launches would dominate the time of a step on a GPU; a graph needs one
launch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch
from torch import Tensor, nn

from edadm_cli.processes import Processes

_WARM_UP_STEPS = 3


class Optimization:
    """Adam with one learning rate per group; all rates decay to zero along a cosine, or stay constant.

    Args:
        rates: Each parameter with its initial learning rate.
        iterations: Number of iterations of the decay.
        decays: Whether the rates decay.
        device: The device of the parameters; on CUDA the state and the rates are there too, as a graph needs them.
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
        """Sets every group's learning rate to `factor` times its initial one."""
        for group, rate in zip(self.adam.param_groups, self._rates, strict=True):
            if self.capturable:
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor

    def decay(self) -> None:
        """Sets the learning rates of the next iteration."""
        self.set_rates(0.5 * (1 + math.cos(math.pi * self._done / self._iterations)) if self._decays else 1.0)
        self._done += 1

    def params(self) -> list[nn.Parameter]:
        """Returns all learned parameters."""
        return [param for group in self.adam.param_groups for param in group["params"]]

    def forget(self) -> None:
        """Sets Adam's moments and step counts to zero."""
        for state in self.adam.state.values():
            for value in state.values():
                value.zero_()


class Learner(Protocol):
    """The object that an optimizer step improves, such as a `UnitLearner`.

    Attributes:
        device: Its device.
        generator: The random generator of its masks, on that device.
        processes: The processes that learn together.
    """

    device: torch.device
    generator: torch.Generator
    processes: Processes

    def loss(self) -> Tensor:
        """Returns this process's share of the loss on the chosen rows."""

    def after_step(self) -> None:
        """Restores constraints, such as positive scales, after the optimizer has changed the parameters."""


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
        """Adds up the gradients of all processes, whose losses are weighted by their numbers of rows."""
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


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Returns the stream on which all graphs of a device are warmed up and captured.

    A parameter's gradient is accumulated on the stream of its first backward, and torch warns where a later backward
    runs on another one. Memory that one warm-up frees is reused by the next on the same stream.
    """
    return torch.cuda.Stream(device)


def _captured(learner: Learner, optimization: Optimization, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    stream = _side_stream(learner.device)
    stream.wait_stream(torch.cuda.current_stream(learner.device))
    with torch.cuda.stream(stream):
        optimization.set_rates(0.0)  # the warm-up must not change the parameters
        for _ in range(_WARM_UP_STEPS):
            optimization.adam.zero_grad(set_to_none=True)
            compute()
        optimization.forget()
    torch.cuda.current_stream(learner.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(learner.generator)
    optimization.adam.zero_grad(set_to_none=True)  # the graph then writes gradients instead of adding to them
    with torch.cuda.graph(graph, stream=stream):
        loss = compute()

    def replay() -> Tensor:
        optimization.decay()
        graph.replay()
        return loss

    return replay
