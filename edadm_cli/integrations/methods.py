"""Methods of an exported denoiser that differ from those that diffusers gives a quantized model.

diffusers refuses to cast quantized models, since with most methods a cast would destroy the scales; ours keep theirs.
It would let PEFT look for layers to adapt and find none; ours say what to do instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn

from edadm_cli.errors import UsageError

_CASTS = ("half", "float")  # the casts of torch that diffusers refuses


def bind_methods(model: nn.Module) -> None:
    """Give a loaded denoiser its own casts and its own refusals, on the instance: its class stays diffusers'."""
    own: dict[str, Callable[..., Any]] = {"to": _to, **{name: getattr(nn.Module, name) for name in _CASTS}}
    if hasattr(model, "load_lora_adapter"):
        own |= {"load_lora_adapter": _load_lora_adapter, "add_adapter": _refuse_adapter}
    for name, method in own.items():
        setattr(model, name, MethodType(method, model))


def _to(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """Move or cast, as `nn.Module.to`; the quantized layers keep their scales in float32."""
    dtype = kwargs.pop("dtype", None) or next((arg for arg in args if isinstance(arg, torch.dtype)), None)
    rest = [arg for arg in args if not isinstance(arg, torch.dtype)]
    if dtype is not None:
        nn.Module.to(model, dtype=dtype)
    return type(model).to(model, *rest, **kwargs) if rest or kwargs else model


def _load_lora_adapter(model: nn.Module, weights: Any, prefix: str | None = "transformer", **kwargs: Any) -> None:
    """Refuse an adapter with weights for the denoiser; one for the text encoders alone has none."""
    is_elsewhere = isinstance(weights, Mapping) and prefix is not None
    if is_elsewhere and not any(name.startswith(f"{prefix}.") for name in weights):
        of_diffusers: Any = type(model)
        of_diffusers.load_lora_adapter(model, weights, prefix=prefix, **kwargs)
        return
    _refuse_adapter(model)


def _refuse_adapter(model: nn.Module, *_: Any, **__: Any) -> None:
    raise UsageError(
        f"The layers of this {type(model).__name__} are quantized and take no adapter: load the LoRA into the "
        "full-precision pipeline, pipeline.fuse_lora(), pipeline.unload_lora_weights(), "
        "pipeline.save_pretrained(FOLDER), and quantize that: edadm run --model FOLDER."
    )
