"""Runs a contender in a process of its own, so that others share neither its memory nor its threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from edadm_cli.bench.pipeline import ImageTime, PipelineRequest
from edadm_cli.bench.running import Running
from edadm_cli.bench.spec import Call, ContenderEnvironment, Spec
from edadm_cli.engines.base import LayerExecution, OperationTime
from edadm_cli.engines.isolation import IsolatedProcess, ProcessLostError, pack, unpack


class ContenderLostError(ProcessLostError):
    """The process of a contender ended before it was asked to.

    Args:
        name: The contender.
        exit_status: Exit status of its process; negative for a signal, `None` if it is not known.
    """

    def __init__(self, name: str, exit_status: int | None) -> None:
        hint = "--no-compiled, or fewer --bits, if the memory does not suffice"
        super().__init__(f"The process of '{name}'", exit_status, hint_if_killed=hint)


class RemoteRunning:
    """A `Running` in a process of its own, whose exceptions are raised here.

    Raises:
        ContenderLostError: The process crashed or was killed.
    """

    def __init__(self, spec: Spec, environment: ContenderEnvironment, calls: Mapping[int, Sequence[Call]]) -> None:
        self.spec = spec
        packed = {batch: [pack(call) for call in group] for batch, group in calls.items()}
        lost = partial(ContenderLostError, spec.name)
        self._process = IsolatedProcess(lost, _begin, spec, environment, packed, threads=environment.threads)
        prediction, self.load_seconds = self._process.call(_first_results)
        self.prediction = torch.from_numpy(prediction)

    def warm_up(self, batch_size: int) -> float:
        """See `Running.warm_up`."""
        return self._process.call(Running.warm_up, batch_size)

    def time(self, batch_size: int, count: int) -> list[float]:
        """See `Running.time`."""
        return self._process.call(Running.time, batch_size, count)

    def memory(self) -> tuple[float | None, float | None]:
        """See `Running.memory`."""
        return self._process.call(Running.memory)

    def layers(self) -> tuple[LayerExecution, ...]:
        """See `Running.layers`."""
        return self._process.call(Running.layers)

    def profile(self, batch_size: int) -> list[OperationTime]:
        """See `Running.profile`."""
        return self._process.call(Running.profile, batch_size)

    def time_image(self, request: PipelineRequest) -> ImageTime:
        """See `Running.time_image`."""
        return self._process.call(Running.time_image, request)

    def close(self) -> None:
        """Ends the process."""
        self._process.close()


def _begin(spec: Spec, environment: ContenderEnvironment, packed: dict[int, list[Any]]) -> Running:
    return Running(spec, environment, {batch: [unpack(call) for call in group] for batch, group in packed.items()})


def _first_results(running: Running) -> tuple[Any, float]:
    """Returns the prediction of the first call as an array, and how long loading and that call took."""
    return running.prediction.numpy(), running.load_seconds
