"""Methods of an exported denoiser that replace those of diffusers' quantized models.

diffusers refuses to cast quantized models, since a cast destroys the scales of most methods; ours stay in float32. PEFT
needs to know how to adapt a quantized layer, and a denoiser with adapters beside its layers would be saved under names
that nobody reads. diffusers would fuse projections by float weights, which are missing here, and would replace
quantized attention without a warning; these methods refuse both and say what to do instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from edadm_cli.errors import UsageError
from edadm_cli.integrations import lora
from edadm_cli.quant.attention import AttentionProducts, QuantizedAttention
from edadm_cli.quant.layers import QuantizedLayer
from edadm_cli.quant.split_layer import SplitLayer


class _Method:
    """A function bound to one instance of a module.

    pickle stores a bound method by the name of its function, which the instance does not have. This object is stored
    with its function and its module, so that a pickled denoiser can be loaded again.
    """

    def __init__(self, function: Callable[..., Any], module: nn.Module) -> None:
        self.function, self.module = function, module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module, *args, **kwargs)


class _SavePretrained(_Method):
    """The method `save_pretrained`, with the signature of diffusers' own, by which pipelines choose its arguments."""

    @property
    def __signature__(self) -> inspect.Signature:
        of_diffusers: Any = type(self.module)
        return inspect.signature(of_diffusers.save_pretrained.__get__(self.module))


_CASTS = ("half", "float")  # the casts of torch that diffusers refuses


def bind_methods(model: nn.Module) -> None:
    """Binds casts and refusals to a loaded denoiser, on the instance only: its class is that of diffusers."""
    methods: dict[str, Callable[..., Any]] = {"to": _to, **{name: getattr(nn.Module, name) for name in _CASTS}}
    if hasattr(model, "load_lora_adapter"):
        methods |= {"load_lora_adapter": lora.load_lora_adapter, "add_adapter": lora.add_adapter}
        methods["state_dict"] = lora.state_dict
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = _SavePretrained(_save, model)  # type: ignore[assignment]
    if hasattr(model, "fuse_qkv_projections") and _has_quantized_attention(model):
        methods |= {"fuse_qkv_projections": _refuse_fusion, "unfuse_qkv_projections": _leave_as_it_is}
    attentions = [module for module in model.modules() if _is_quantized(module)]
    if attentions:
        methods["set_attention_slice"] = _refuse_slices
    for attention in attentions:
        attention.set_processor = _Method(_set_processor, attention)  # type: ignore[assignment]
    for name, method in methods.items():
        setattr(model, name, _Method(method, model))


def _to(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """Moves or casts the model as `nn.Module.to` does; the scales of quantized layers stay in float32."""
    _forget_graphs(model)
    dtype = kwargs.pop("dtype", None) or next((arg for arg in args if isinstance(arg, torch.dtype)), None)
    rest = [arg for arg in args if not isinstance(arg, torch.dtype)]
    if dtype is not None:
        nn.Module.to(model, dtype=dtype)
    return type(model).to(model, *rest, **kwargs) if rest or kwargs else model


def _forget_graphs(model: nn.Module) -> None:
    """Frees the CUDA graphs of the model's calls, whose memory would stay on the GPU that the model leaves."""
    forget = getattr(model.__dict__.get("forward"), "forget", None)
    if forget is not None:
        forget()


def _save(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Saves the denoiser as diffusers' `save_pretrained` does, unless it has a LoRA."""
    if lora.has_adapters(model):
        raise UsageError(
            "An export is saved without a LoRA beside its layers: unload it first (pipeline.unload_lora_weights()), or "
            "fuse it into the weights instead (edadm export --lora FILE)."
        )
    of_diffusers: Any = type(model)
    of_diffusers.save_pretrained(model, *args, **kwargs)


def _is_quantized(module: nn.Module) -> bool:
    return isinstance(getattr(module, "processor", None), QuantizedAttention)


def _refuse_slices(model: nn.Module, slice_size: str | int | list[int] | None) -> None:
    """Refuses sliced attention; `None` asks for attention without slices, which it already is."""
    if slice_size is not None:
        _refuse_processor(type(model).__name__)


def _set_processor(attention: nn.Module, processor: object, *args: Any) -> None:
    """Accepts only processors with quantized attention, such as the previous one of the module."""
    if not isinstance(processor, AttentionProducts):
        _refuse_processor(type(processor).__name__)
    of_diffusers: Any = type(attention)
    of_diffusers.set_processor(attention, processor, *args)


def _refuse_processor(processor: str) -> None:
    raise UsageError(
        f"Attention is quantized here and would lose its scales to {processor}: leave out enable_attention_slicing(), "
        "set_attn_processor() and what else exchanges attention; recipes without attention.quantize keep it floating."
    )


def _has_quantized_attention(model: nn.Module) -> bool:
    """Returns whether an attention has a quantized projection or quantized products, which a fusion would replace."""
    quantized = (QuantizedLayer, SplitLayer, QuantizedAttention)
    attentions = (module for module in model.modules() if hasattr(module, "fuse_projections"))
    return any(isinstance(child, quantized) for attention in attentions for child in attention.children())


def _refuse_fusion(model: nn.Module) -> None:
    raise UsageError(
        f"The projections of this {type(model).__name__} are quantized, each with scales of its own, and cannot be "
        "fused: leave fuse_qkv_projections() out; pipeline.fuse_qkv_projections(unet=False) fuses those of the VAE."
    )


def _leave_as_it_is(model: nn.Module) -> None:
    """Does nothing, since there is no fused projection to undo."""
