"""Watches the scheduler of a pipeline while it samples: keeps the last sample, and seeds the noise of every step."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class _SamplerEndedError(Exception):
    """Leaves a pipeline after the last step of its scheduler."""


@contextmanager
def watched_scheduler(
    pipeline: DiffusionPipeline, arguments: dict[str, Any], last_sample: list[Tensor], *, decodes: bool = True
) -> Iterator[None]:
    """Records the last sample of the scheduler while entered.

    It also passes the generators to the scheduler for a pipeline that adds noise at every step without them
    (LDMPipeline), whose noise would otherwise come from the global generator.

    Args:
        pipeline: The pipeline.
        arguments: The arguments of its call.
        last_sample: A list that holds the latest sample.
        decodes: Whether the pipeline goes on after the last step. Otherwise the block is left then.
    """
    scheduler = pipeline.scheduler
    is_noisy = bool(arguments.get("eta")) and "generator" in inspect.signature(scheduler.step).parameters
    scheduler.step = _WatchedStep(scheduler, arguments["generator"] if is_noisy else None, last_sample, decodes)
    try:
        yield
    except _SamplerEndedError:
        pass
    finally:
        del scheduler.step


class _WatchedStep:
    """Takes the place of a scheduler's `step` and keeps the last sample. A copy of the scheduler has its own `step`.

    The scheduler keeps its class, because pipelines compare it.

    Args:
        scheduler: The scheduler.
        generator: The generator of the step's noise, unless the pipeline passes one; `None` adds no generator.
        last_sample: A list that holds the latest sample.
        decodes: Whether the pipeline goes on after the last step.
    """

    def __init__(self, scheduler: Any, generator: Any, last_sample: list[Tensor], decodes: bool) -> None:
        functools.update_wrapper(self, scheduler.step)  # pipelines inspect the signature
        self._scheduler, self._generator, self._last_sample = scheduler, generator, last_sample
        self._step: Callable[..., Any] = scheduler.step
        self._decodes, self._num_calls = decodes, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._generator is not None:
            kwargs.setdefault("generator", self._generator)
        output = self._step(*args, **kwargs)
        self._last_sample[:] = [output[0] if isinstance(output, tuple) else output.prev_sample]
        self._num_calls += 1
        if not self._decodes and self._num_calls == len(self._scheduler.timesteps):
            raise _SamplerEndedError
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Returns the method of the copied scheduler, which `deepcopy` has created already."""
        return MethodType(type(self._scheduler).step, memo[id(self._scheduler)])
