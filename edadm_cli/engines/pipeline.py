"""Puts the denoiser of a diffusers pipeline on an engine, so that the pipeline samples images with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from edadm_cli.engines.adapters import strengths_of
from edadm_cli.engines.base import CompiledDenoiser
from edadm_cli.engines.results import require_prediction, require_shape
from edadm_cli.errors import UsageError
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.plugins import is_of_this_package

_TOO_LATE = ("enable_freeu", "set_attn_processor", "enable_cache")  # methods that change what a denoiser predicts
_ADAPTERS_TOO_LATE = ("load_lora_adapter", "add_adapter", "fuse_lora", "unload_lora", "delete_adapters")
_OF_STRENGTHS = ("set_adapters", "enable_lora", "disable_lora", "enable_adapters", "disable_adapters")
_OF_CACHES = ("cache_context", "_reset_stateful_cache", "is_cache_enabled")


class EngineDenoiser(nn.Module):
    """Takes the place of a pipeline's denoiser. It has the same calls and attributes, and computes on an engine.

    Args:
        denoiser: The module that it replaces. Its weights are freed. Its configuration stays, as do all attributes that
            a pipeline reads, such as `add_embedding.linear_1.in_features`.
        compiled: The same network on an engine.
    """

    def __init__(self, denoiser: nn.Module, compiled: CompiledDenoiser) -> None:
        super().__init__()
        self.__dict__["_shell"] = denoiser  # it is not a submodule, so that casts and moves do not reach it
        first = next(denoiser.parameters())
        # pipelines read dtype and device from the denoiser's parameters; this parameter has no elements
        self.anchor = nn.Parameter(torch.empty(0, dtype=first.dtype, device=first.device), requires_grad=False)
        nn.Module.to(denoiser, "meta")
        self.compiled = compiled
        self._is_unchecked = not is_of_this_package(compiled)  # the first call shows which shape it predicts

    def use_cache_of(self, parts: nn.Module) -> None:
        """Passes a pipeline's calls of cache methods to the modules that run; see `integrations.caching`."""
        self.__dict__["_parts"] = parts

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the denoiser on its engine.

        Raises:
            MachineError: An engine of another package returns no prediction, or one of another shape.
        """
        output = require_prediction(self.compiled, self.compiled(*args, **kwargs))
        if self._is_unchecked:
            require_shape(self.compiled, self.stands_for, args, kwargs, output)
            self._is_unchecked = False
        return output

    @property
    def stands_for(self) -> nn.Module:
        """Returns the denoiser that this module replaces. Calls have its arguments, and its weights are freed."""
        shell: nn.Module = self.__dict__["_shell"]
        return shell

    @property
    def dtype(self) -> torch.dtype:
        """Returns the element type of the inputs and the prediction."""
        return self.anchor.dtype

    @property
    def device(self) -> torch.device:
        """Returns the device of the inputs and the prediction."""
        return self.anchor.device

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            owner = self.__dict__.get("_parts") if name in _OF_CACHES else None
            attribute = getattr(owner or self.__dict__["_shell"], name)
        if name in _OF_STRENGTHS:
            return partial(self._weight_adapters, attribute)
        return partial(_refuse, name) if name in _TOO_LATE + _ADAPTERS_TOO_LATE else attribute

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """Returns the denoiser's class, because pipelines of diffusers ignore components of unknown classes."""
        return type(self.__dict__.get("_shell", self))

    def _weight_adapters(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Calls a method that sets adapters, and passes the strengths to the engine without compiling again."""
        method(*args, **kwargs)
        self.compiled.set_strengths(strengths_of(self.stands_for))


def _refuse(name: str, *_: Any, **__: Any) -> None:
    if name in _ADAPTERS_TOO_LATE:
        raise UsageError(
            f"The denoiser is compiled on an engine already, and {name}() would change nothing.",
            hint="edadm_cli.load(FOLDER, lora={'FILE.safetensors': 1.0})",
        )
    raise UsageError(
        f"The denoiser is compiled on an engine already, and {name}() would change nothing: call it on the pipeline "
        "that the engine is given."
    )


def put_on_engine(model: LoadedModel, compiled: CompiledDenoiser) -> LoadedModel:
    """Replaces the denoiser of a pipeline, in place, with one on an engine, and frees its weights in torch."""
    name, denoiser = model.denoiser_name, model.denoiser
    stand_in = EngineDenoiser(denoiser, compiled)
    # a combined pipeline, such as that of Kandinsky 2.2, has further pipelines that share its components
    for holder in (model.pipeline, *vars(model.pipeline).values()):
        if getattr(holder, name, None) is denoiser:
            setattr(holder, name, stand_in)
    return model
