"""Records inputs of the denoiser that change from step to step, besides its sample and timestep.

Some denoisers predict two things at once and are called with two noisy samples, such as the clip and the sound of
LTX-2. Others are called with the timestep that a step ends at. These inputs are conditions with a value per step: a
trajectory's row holds the values of all steps, and `select` takes the value of the step that it chooses.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from edadm_cli.collect.branches import SplitRows, differences, equal, storable
from edadm_cli.models.denoiser_calls.calls import DenoiserCall


@dataclass
class Varying:
    """The values that changing conditions have at each step, by dotted name.

    Attributes:
        values: The values of the first or only call of each step, with one row per row of the sample.
        of_second: The values of the second call of each step, where each branch of guidance is a call of its own.
    """

    values: dict[str, list[Tensor]] = field(default_factory=dict)
    of_second: dict[str, list[Tensor]] = field(default_factory=dict)

    def add_step(self, call: DenoiserCall, first: DenoiserCall, second: DenoiserCall | None, step: int) -> str | None:
        """Records the values of a step, and finds conditions that change for the first time.

        Args:
            call: The call of this step.
            first: The call of the first step.
            second: The second call of the first step; `None` where each step is one call.
            step: The number of steps before this one.

        Returns:
            The name of a change that cannot be recorded, because it is not a condition with rows of the same shape as
            before, or because it also distinguishes the two branches of guidance; else `None`.
        """
        for name in self.new(call, first):
            before = first.condition.get(name)
            if before is None or name not in call.condition or call.condition[name].shape != before.shape:
                return name
            if second is not None and not equal(before, second.tensors.get(name)):
                return name
            self.values[name] = [storable(before)] * step
            if second is not None:
                self.of_second[name] = [storable(second.tensors[name])] * step
        for name, values in self.values.items():
            values.append(storable(call.tensors[name]))
        return None

    def add_second(self, call: DenoiserCall) -> None:
        """Records the values of the second call of a step."""
        for name, values in self.of_second.items():
            values.append(storable(call.tensors[name]))

    def new(self, call: DenoiserCall, other: DenoiserCall) -> list[str]:
        """Returns what differs in two calls besides the tensors that are known to change."""
        return [name for name in differences(call, other) if name not in self.values]

    def conditions(self, branches: int, split: SplitRows) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns the conditions with the prompt and without it, each with shape `(n, T, *)`.

        Args:
            branches: 2 with guidance, else 1.
            split: Splits the rows of a call by branch.
        """
        conditional = {name: _by_trajectory(values, split, 1) for name, values in self.values.items()}
        if branches == 1:
            return conditional, {}
        without = self.of_second or self.values
        return conditional, {name: _by_trajectory(values, split, 0) for name, values in without.items()}


def _by_trajectory(values: list[Tensor], split: SplitRows, branch: int) -> Tensor:
    """Returns the values of all steps in one branch, 0 without the prompt or 1 with it, with shape `(n, T, *)`."""
    return torch.stack([split(value)[branch] for value in values], dim=1).clone()
