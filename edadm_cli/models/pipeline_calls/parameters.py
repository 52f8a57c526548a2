"""Reads which parameters the `__call__` of a pipeline takes. Nothing here imports a library that computes."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def call_parameters(pipeline: DiffusionPipeline) -> dict[str, inspect.Parameter]:
    """Returns the parameters of a pipeline's `__call__`, by name."""
    return dict(inspect.signature(type(pipeline).__call__).parameters)


def call_default(pipeline: DiffusionPipeline, name: str) -> Any:
    """Returns the default value of a parameter of the pipeline's `__call__`; `None` if there is none."""
    parameter = call_parameters(pipeline).get(name)
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


def takes_prompts(pipeline: DiffusionPipeline) -> bool:
    """Returns whether this pipeline takes prompts."""
    return "prompt" in call_parameters(pipeline)


def takes_guidance(pipeline: DiffusionPipeline) -> bool:
    """Returns whether this pipeline has guidance with a scale."""
    return not {"guidance_scale", "true_cfg_scale"}.isdisjoint(call_parameters(pipeline))
