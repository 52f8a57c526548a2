"""A diffusers pipeline whose denoiser runs on an engine: images, not only measurements."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from edadm_cli.engines.adapters import strengths_of
from edadm_cli.engines.base import CompiledDenoiser
from edadm_cli.errors import UsageError
from edadm_cli.models.loading import LoadedModel

_TOO_LATE = ("enable_freeu", "set_attn_processor", "enable_cache")  # methods that change what a denoiser predicts
_ADAPTERS_TOO_LATE = ("load_lora_adapter", "add_adapter", "fuse_lora", "unload_lora", "delete_adapters")
_OF_STRENGTHS = ("set_adapters", "enable_lora", "disable_lora", "enable_adapters", "disable_adapters")
_OF_CACHES = ("cache_context", "_reset_stateful_cache", "is_cache_enabled")


class EngineDenoiser(nn.Module):
    """Stands in for a pipeline's denoiser: called like it, looks like it, computes on an engine.

    Args:
        denoiser: The module that it replaces. Its weights are released; its configuration, and whatever else a
            pipeline reads from it (`add_embedding.linear_1.in_features`), stays.
        compiled: The same network on an engine.
    """

    def __init__(self, denoiser: nn.Module, compiled: CompiledDenoiser) -> None:
        super().__init__()
        self.__dict__["_shell"] = denoiser  # no submodule: it has no part in casts and moves
        first = next(denoiser.parameters())
        # pipelines take dtype and device from the denoiser's parameters; this one has no element
        self.anchor = nn.Parameter(torch.empty(0, dtype=first.dtype, device=first.device), requires_grad=False)
        nn.Module.to(denoiser, "meta")
        self.compiled = compiled

    def use_cache_of(self, parts: nn.Module) -> None:
        """Has pipelines name calls and forget them on the denoiser that runs; see `integrations.caching`."""
        self.__dict__["_parts"] = parts

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the denoiser on its engine."""
        return self.compiled(*args, **kwargs)

    @property
    def stands_for(self) -> nn.Module:
        """The denoiser whose arguments the calls have; its weights are released."""
        shell: nn.Module = self.__dict__["_shell"]
        return shell

    @property
    def dtype(self) -> torch.dtype:
        """Element type of inputs and prediction."""
        return self.anchor.dtype

    @property
    def device(self) -> torch.device:
        """Where inputs and prediction lie."""
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
        """The denoiser's class: pipelines of diffusers pass over what is not a model of theirs."""
        return type(self.__dict__.get("_shell", self))

    def _weight_adapters(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Weight the adapters that the engine was given; nothing is compiled again."""
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
    """Puts the denoiser of a pipeline on an engine, in place; the weights it had in torch are released."""
    stand_in = EngineDenoiser(model.denoiser, compiled)
    setattr(model.pipeline, model.denoiser_name, stand_in)
    return model
