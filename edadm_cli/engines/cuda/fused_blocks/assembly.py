"""Replaces a denoiser's modules, by class, with products and fused blocks. Other modules keep their own `forward`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from edadm_cli.engines.base import AttentionForm, LayerExecution
from edadm_cli.engines.cuda.fused_blocks.attention import FusedAttention
from edadm_cli.engines.cuda.fused_blocks.residual import (
    FusedDownsample,
    FusedOutput,
    FusedResidualBlock,
    FusedUpBlock,
    FusedUpsample,
    TimeBias,
)
from edadm_cli.engines.cuda.fused_blocks.transformer import (
    FusedFeedForward,
    FusedTransformer2D,
    FusedTransformerBlock,
    GatedProduct,
)
from edadm_cli.engines.cuda.graph_passes.attention_graph import integer_kernel_runs
from edadm_cli.engines.cuda.products.lowering import Lowering
from edadm_cli.engines.cuda.products.product import IntegerConv2d, IntegerLinear
from edadm_cli.engines.cuda.state import StepState
from edadm_cli.engines.listing import list_layers
from edadm_cli.models.families.attention import PLAIN_PROCESSORS, QUANTIZED_PROCESSOR
from edadm_cli.quant.attention import QuantizedAttention
from edadm_cli.quant.layers import QuantizedLayer
from edadm_cli.quant.network import set_module
from edadm_cli.quant.split_layer import SplitLayer

_LAYERS = (nn.Linear, nn.Conv2d, QuantizedLayer, SplitLayer)
_ATTENTION_IS_FLOAT = "operands on the integer grids, products in floating point"
_PLAIN_PROCESSORS = (*PLAIN_PROCESSORS, QUANTIZED_PROCESSOR)


class Assembly:
    """Builds the denoiser that runs.

    Args:
        lowering: It turns layers into products.
        prompt_cache: Whether keys and values of cross-attention are computed once per prompt, where possible.
        attention: The form of those attention products that the recipe leaves in float.
    """

    def __init__(self, lowering: Lowering, prompt_cache: bool, attention: AttentionForm = "float") -> None:
        self.lowering, self._prompt_cache, self._attention_form = lowering, prompt_cache, attention
        self.state = StepState()
        self._integer_attentions: set[str] = set()
        self._builders: dict[str, Callable[[str, Any], nn.Module | None]] = {
            "ResnetBlock2D": self._residual_block,
            "Downsample2D": self._downsample,
            "Upsample2D": self._upsample,
            "UpBlock2D": self._up_block,
            "CrossAttnUpBlock2D": self._up_block,
            "AttnUpBlock2D": self._up_block,
            "Attention": self._attention,
            "FeedForward": self._feed_forward,
            "BasicTransformerBlock": self._transformer_block,
            "Transformer2DModel": self._transformer,
        }

    def build(self, denoiser: nn.Module) -> tuple[nn.Module, tuple[LayerExecution, ...]]:
        """Returns a copy of `denoiser` that runs on the kernels, and how each of its layers runs."""
        shared: dict[int, Any] = {id(m): m for m in denoiser.modules() if isinstance(m, QuantizedLayer)}
        model = copy.deepcopy(denoiser, shared)  # the copy shares the quantized layers, which are all replaced below
        self.state.prompt.is_active = self._prompt_cache and _passes_prompt_on(model)
        self._output(model)
        self._walk("", model)
        # diffusers' own `to` warns about modules that its models prefer to keep in float32
        nn.Module.to(model, self.lowering.device, self.lowering.dtype)
        nn.Module.to(model, memory_format=torch.channels_last)
        # diffusers' models read their element type from a parameter, and there may be none left
        anchor = torch.empty(0, dtype=self.lowering.dtype, device=self.lowering.device)
        model.register_parameter("rest", nn.Parameter(anchor, requires_grad=False))
        self.state.time.freeze()
        layers = list_layers(denoiser, self.lowering.dtype, self._decision)
        return model.eval().requires_grad_(False), layers

    def _decision(self, name: str, layer: nn.Module) -> tuple[str, str | None]:
        if isinstance(layer, QuantizedAttention):
            return (
                ("int8", None) if name in self._integer_attentions else (self.lowering.float_name, _ATTENTION_IS_FLOAT)
            )
        return self.lowering.decisions[name]

    def _walk(self, name: str, module: nn.Module) -> None:
        for child_name, child in list(module.named_children()):
            path = f"{name}.{child_name}" if name else child_name
            replacement = self._replacement(path, child)
            if replacement is None:
                self._walk(path, child)
            else:
                set_module(module, child_name, replacement)

    def _replacement(self, name: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, _LAYERS):
            return self._layer(name, module)
        build = self._builders.get(type(module).__name__)
        return None if build is None else build(name, module)

    def _layer(self, name: str, layer: nn.Module) -> nn.Module:
        # a floating-point layer is not replaced, because other modules may read its attributes
        is_float = isinstance(layer, nn.Linear | nn.Conv2d)
        return layer if is_float and name not in self.lowering.adapters else self.lowering.product(name, layer)

    def _residual_block(self, name: str, block: Any) -> nn.Module | None:
        resamples = block.upsample is not None or block.downsample is not None
        convolutions = (block.conv1, block.conv2)
        if resamples or block.time_embedding_norm != "default" or type(block.nonlinearity).__name__ != "SiLU":
            return None
        if any(isinstance(conv, SplitLayer) for conv in convolutions) or not _are_group_norms(block.norm1, block.norm2):
            return None
        first, second = (self.lowering.product(f"{name}.conv{i}", conv) for i, conv in enumerate(convolutions, 1))
        shortcut = None
        if block.conv_shortcut is not None:
            shortcut = self.lowering.product(f"{name}.conv_shortcut", block.conv_shortcut)
        time_bias = self._time_bias(f"{name}.time_emb_proj", block)
        return FusedResidualBlock(block, (first, second), shortcut, time_bias, self.lowering)

    def _time_bias(self, name: str, block: Any) -> TimeBias | None:
        if block.time_emb_proj is None:
            return None
        layer = self.lowering.product(name, block.time_emb_proj)
        if isinstance(layer, IntegerLinear) and not block.skip_time_act:
            place = self.state.time.add(layer)
            return lambda embedding: self.state.time.bias(place, embedding)
        if block.skip_time_act:
            return layer
        return lambda embedding: layer(F.silu(embedding))

    def _downsample(self, name: str, module: Any) -> nn.Module | None:
        if not module.use_conv or module.norm is not None or not isinstance(module.conv, _LAYERS):
            return None
        if isinstance(module.conv, SplitLayer):
            return None
        one_side = module.padding == 0
        convolution = self.lowering.product(f"{name}.conv", module.conv, (0, 1, 0, 1) if one_side else None)
        return FusedDownsample(convolution, one_side)

    def _upsample(self, name: str, module: Any) -> nn.Module | None:
        if not module.use_conv or module.use_conv_transpose or module.norm is not None or not module.interpolate:
            return None
        if module.name != "conv" or not isinstance(module.conv, QuantizedLayer):
            return None
        convolution = self.lowering.product(f"{name}.conv", module.conv)
        return FusedUpsample(convolution) if isinstance(convolution, IntegerConv2d) else None

    def _up_block(self, name: str, block: Any) -> nn.Module:
        self._walk(name, block)
        return FusedUpBlock(block) if FusedUpBlock.joins(block) else block

    def _attention(self, name: str, attention: Any) -> FusedAttention | None:
        plain = type(attention.processor).__name__ in _PLAIN_PROCESSORS
        extras = ("spatial_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim")
        if not plain or any(getattr(attention, extra, None) is not None for extra in extras):
            return None
        if attention.group_norm is not None and not _are_group_norms(attention.group_norm):
            return None
        projections = (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0])
        if not all(isinstance(layer, nn.Linear | QuantizedLayer) for layer in projections):
            return None
        names = ("to_q", "to_k", "to_v", "to_out.0")
        q, k, v, out = (
            self.lowering.product(f"{name}.{n}", layer) for n, layer in zip(names, projections, strict=True)
        )
        prompt = self.state.prompt if attention.is_cross_attention else None
        fused = FusedAttention(attention, (q, k, v, out), prompt, self._attention_form)
        width = attention.to_q.out_features // attention.heads
        if fused.operands is not None and integer_kernel_runs(self.lowering.device, self.lowering.dtype, width):
            self._integer_attentions.add(name)
        if attention.group_norm is not None:
            fused.use_norm(attention.group_norm, self.lowering)
        return fused

    def _feed_forward(self, name: str, module: Any) -> FusedFeedForward | None:
        activation = _activation(module.net[0])
        if activation is None:
            return None
        linears: tuple[Any, Any] = (module.net[0].proj, module.net[2])
        if not all(isinstance(layer, nn.Linear | QuantizedLayer) for layer in linears):
            return None
        project = self.lowering.product(f"{name}.net.0.proj", linears[0])
        out = self.lowering.product(f"{name}.net.2", linears[1])
        gated = None
        if activation == "geglu" and isinstance(project, IntegerLinear) and isinstance(out, IntegerLinear):
            gated = GatedProduct(self.lowering.codes(linears[0]), project, out, self.lowering.can_pack(linears[0]))
        return FusedFeedForward((project, out), activation, gated)

    def _transformer_block(self, name: str, block: Any) -> nn.Module | None:
        norms = [block.norm1, block.norm3] + ([] if block.attn2 is None else [block.norm2])
        plain = block.norm_type == "layer_norm" and all(isinstance(norm, nn.LayerNorm) for norm in norms)
        if not plain or block.pos_embed is not None or hasattr(block, "fuser") or block.only_cross_attention:
            return None
        for part in ("attn1", "attn2", "ff"):
            child = getattr(block, part)
            fused = None if child is None else self._replacement(f"{name}.{part}", child)
            if fused is not None:
                setattr(block, part, fused)
        parts = [block.attn1] if block.attn2 is None else [block.attn1, block.attn2]
        if not all(isinstance(part, FusedAttention) for part in parts) or not isinstance(block.ff, FusedFeedForward):
            return None
        return FusedTransformerBlock(block, parts, block.ff, self.lowering)

    def _transformer(self, name: str, model: Any) -> nn.Module | None:
        if not model.is_input_continuous or not _are_group_norms(model.norm):
            return None
        self._walk(f"{name}.transformer_blocks", model.transformer_blocks)
        layers = (model.proj_in, model.proj_out)
        if any(isinstance(layer, SplitLayer) for layer in layers):
            return None
        proj_in, proj_out = (
            self.lowering.product(f"{name}.{n}", layer)
            for n, layer in zip(("proj_in", "proj_out"), layers, strict=True)
        )
        return FusedTransformer2D(model, (proj_in, proj_out), self.lowering)

    def _output(self, model: Any) -> None:
        """Fuses the last normalization, SiLU and convolution of a UNet."""
        norm, convolution = getattr(model, "conv_norm_out", None), getattr(model, "conv_out", None)
        act = type(getattr(model, "conv_act", None)).__name__
        if act != "SiLU" or not _are_group_norms(norm) or not isinstance(convolution, nn.Conv2d | QuantizedLayer):
            return
        product = self.lowering.product("conv_out", convolution)
        model.conv_out = FusedOutput(norm, product, self.lowering)  # type: ignore[arg-type]
        model.conv_norm_out, model.conv_act = nn.Identity(), nn.Identity()


def _are_group_norms(*norms: object) -> bool:
    return all(isinstance(norm, nn.GroupNorm) for norm in norms)


def _activation(module: nn.Module) -> str | None:
    """Returns the name of the activation in a feed-forward layer's first module; `None` if it is unknown."""
    name = type(module).__name__
    if name == "GEGLU":
        return "geglu"
    if name == "GELU":
        return {"none": "gelu", "tanh": "gelu-tanh"}.get(getattr(module, "approximate", ""))
    return None


def _passes_prompt_on(model: Any) -> bool:
    """Returns whether cross-attention reads the text states that the denoiser is called with, unchanged."""
    return type(model).__name__ == "UNet2DConditionModel" and getattr(model, "encoder_hid_proj", None) is None
