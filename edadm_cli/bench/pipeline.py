"""Measures the time of a whole image, from prompt to pixels, with the measured denoiser in its pipeline."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edadm_cli.engines.base import CompiledDenoiser, LayerExecution, OperationTime
from edadm_cli.engines.cuda.capture import GraphedFunction, GraphMemory
from edadm_cli.engines.cuda.compiled.plain import compile_blocks
from edadm_cli.engines.pipeline import put_on_engine
from edadm_cli.errors import UsageError
from edadm_cli.integrations.caching import enable_cache
from edadm_cli.models.loading import load_model
from edadm_cli.models.pipeline_calls.parameters import takes_prompts
from edadm_cli.models.pipeline_calls.sampling import sample
from edadm_cli.models.registry import ModelEntry

_WARM_UP_STEPS = 2


@dataclass(frozen=True)
class PipelineRequest:
    """The image that is generated.

    Attributes:
        model: A known name, a diffusers folder or a hub id.
        entry: The model's entry with its defaults, as plain data.
        prompt: Its prompt, for pipelines that take one.
        num_steps: Sampler steps.
        guidance_scale: Scale of classifier-free guidance; `None` for a pipeline without guidance.
        seed: Seed of the noise.
        cache: Step cache, `NAME` or `NAME:VALUE`; `None` for none.
    """

    model: str
    entry: dict[str, Any]
    prompt: str | None
    num_steps: int
    guidance_scale: float | None
    seed: int
    cache: str | None = None


@dataclass(frozen=True)
class ImageTime:
    """The time of an image.

    Attributes:
        seconds: The seconds that the image takes.
        in_denoiser: The seconds of these that were spent in the denoiser.
        not_cached: The reason why the requested step cache is not used; `None` if it is used or none was requested.
    """

    seconds: float
    in_denoiser: float
    not_cached: str | None = None


def time_image(
    request: PipelineRequest, function: Callable[..., Any], device: torch.device, is_torch: bool, dtype: str
) -> ImageTime:
    """Generates one image and returns its time; a shorter image before it warms the pipeline up.

    Args:
        request: The image.
        function: The function that runs the denoiser.
        device: Where the pipeline runs.
        is_torch: Whether torch runs the denoiser; the whole pipeline then has its element type. With an engine, the
            rest of the pipeline is in float32 on a CPU and in the engine's element type on CUDA.
        dtype: Element type of the denoiser.
    """
    rest = getattr(torch, dtype) if is_torch or device.type == "cuda" else torch.float32
    model = load_model(request.model, device, rest, ModelEntry.model_validate(request.entry))
    timed = TimedDenoiser(function, device)
    put_on_engine(model, timed)
    not_cached = None
    if request.cache is not None:
        try:
            enable_cache(model, request.cache)
        except UsageError as error:
            not_cached = error.message

    def once(num_steps: int) -> float:
        _wait(device)
        timed.seconds, started = 0.0, time.perf_counter()
        sample(
            model,
            seeds=[request.seed],
            prompts=[request.prompt or ""] if takes_prompts(model.pipeline) else None,
            num_steps=num_steps,
            guidance_scale=request.guidance_scale,
        )
        _wait(device)
        return time.perf_counter() - started

    once(min(_WARM_UP_STEPS, request.num_steps))
    seconds = once(request.num_steps)
    return ImageTime(seconds, timed.seconds, not_cached)


class TimedDenoiser(CompiledDenoiser):
    """Wraps any function that runs a denoiser and adds up the seconds that are spent in it."""

    def __init__(self, function: Callable[..., Any], device: torch.device) -> None:
        self._function, self._device, self.seconds = function, device, 0.0
        self._whole, self._part_memory = function, GraphMemory()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function and waits for its result."""
        _wait(self._device)
        started = time.perf_counter()
        output = self._function(*args, **kwargs)
        _wait(self._device)
        self.seconds += time.perf_counter() - started
        return output

    def parts(self) -> nn.Module:
        """Returns the denoiser as a module: the engine's `parts`, or torch's module without its CUDA graph."""
        function = self._function
        if isinstance(function, CompiledDenoiser):
            return function.parts()
        if isinstance(function, GraphedFunction):
            function = function.function
        from torch._dynamo import OptimizedModule  # its import takes longer than torch's own

        if isinstance(function, OptimizedModule):
            function = function._orig_mod
            compile_blocks(function)
        if not isinstance(function, nn.Module):
            return super().parts()
        self._function = function
        return function

    def record(self, part: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a part in CUDA graphs of its own if the whole step was a CUDA graph."""
        if isinstance(self._whole, CompiledDenoiser):
            return self._whole.record(part)
        return GraphedFunction(part, self._part_memory) if isinstance(self._whole, GraphedFunction) else part

    @property
    def layers(self) -> tuple[LayerExecution, ...]:
        """Returns nothing, because the layers of a function are not known."""
        return ()

    def profile(self, *args: Any, **kwargs: Any) -> list[OperationTime]:
        """Returns nothing, because the operations of a function are not known."""
        return []


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
