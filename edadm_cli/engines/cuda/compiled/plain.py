"""Runs any denoiser on the kernels: its own `forward`, with layers that multiply their codes, compiled by torch.

Denoisers of a known structure are assembled from fused blocks instead; see `assembly`.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from edadm_cli.engines.adapters import AdaptedLayer, SideBranch
from edadm_cli.engines.base import AttentionForm, LayerExecution
from edadm_cli.engines.cuda.compiled.conditioning import condition_at_once
from edadm_cli.engines.cuda.compiled.flux import fuse_single_blocks
from edadm_cli.engines.cuda.compiled.joint_attention import join_streams
from edadm_cli.engines.cuda.compiled.layer_product import KernelProduct
from edadm_cli.engines.cuda.graph_passes.graph_pass import attention_backend
from edadm_cli.engines.cuda.products.lowering import product_refusal
from edadm_cli.engines.cuda.recording import leave_unrecorded
from edadm_cli.engines.listing import list_layers
from edadm_cli.quant.attention import QuantizedAttention
from edadm_cli.quant.layers import QuantizedLayer
from edadm_cli.quant.network import deploy, set_module

_ATTENTION_IS_FLOAT = "operands on the integer grids, products in floating point"
_FUSED_STRUCTURE = "ResnetBlock2D"
_MIN_REPEATS = 4
"""The least number of blocks of one class that are compiled one by one, as equal blocks share a compilation."""
_MAX_SHAPES = 64
"""The largest number of compilations of one block for different input sizes; beyond its own limit, 8, torch raises."""


def has_fused_blocks(denoiser: nn.Module) -> bool:
    """Returns whether `assembly` supports the structure of a denoiser, which is so for UNets of residual blocks."""
    return any(type(module).__name__ == _FUSED_STRUCTURE for module in denoiser.modules())


def build_plain(
    denoiser: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    adapters: Mapping[str, SideBranch] = MappingProxyType({}),
) -> tuple[nn.Module, tuple[LayerExecution, ...]]:
    """Returns a copy of `denoiser` whose layers multiply their codes on `device`, and how each of its layers runs.

    The side branches of LoRA adapters, by the names of their layers, run beside these layers.

    Tensors that are on the device already, in the right element type, are shared with `denoiser` and not copied.
    """
    model = placed_copy(denoiser, device, dtype).eval().requires_grad_(False)
    leave_unrecorded(model)  # the engine records what it builds
    product = _SilentProduct((device.type,))
    deploy(model, product)
    for name, branch in adapters.items():  # this comes before layers are fused, since adapted layers are not fused
        set_module(model, name, AdaptedLayer(model.get_submodule(name), branch.to(device, dtype)))
    fuse_single_blocks(model, product)
    join_streams(model)
    condition_at_once(model)
    float_name = str(dtype).removeprefix("torch.")

    def decide(name: str, layer: nn.Module) -> tuple[str, str | None]:
        if isinstance(layer, QuantizedAttention):
            return float_name, _ATTENTION_IS_FLOAT
        assert isinstance(layer, QuantizedLayer)
        reason = product_refusal(layer)
        return ("int8", None) if reason is None else (float_name, reason)

    return model, list_layers(denoiser, dtype, decide)


def placed_copy(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Returns a copy of a quantized model on a device, in an element type; codes and scales keep their types."""
    placed: dict[int, Any] = {}
    for module in model.modules():
        keeps = isinstance(module, QuantizedLayer | QuantizedAttention)
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in placed:
                placed[id(parameter)] = nn.Parameter(parameter.detach().to(device, dtype), requires_grad=False)
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in placed:
                to = buffer.dtype if keeps or not buffer.is_floating_point() else dtype
                placed[id(buffer)] = buffer.detach().to(device, to)
        if isinstance(module, QuantizedLayer):
            placed[id(module._weight)] = None
    return copy.deepcopy(model, placed)


def compile_blocks(model: nn.Module, attention: AttentionForm | None = None) -> None:
    """Makes torch compile a model in place: its repeated blocks, which share a compilation, or else the whole model.

    Later calls of the model must be inside `many_shapes`.

    Args:
        model: The model, which is changed.
        attention: The form of the attention that `edadm_kernels` computes if faster; `None` leaves it all to torch.
    """
    backend = "inductor" if attention is None else attention_backend(attention)
    blocks = repeated_blocks(model)
    for block in blocks or [model]:
        block.compile(fullgraph=bool(blocks), dynamic=False, backend=backend)
    conditioning = model._modules.get("conditioning")
    if conditioning is not None:
        conditioning.compile(fullgraph=True, dynamic=False)


def many_shapes() -> AbstractContextManager[object]:
    """Returns a context in which torch compiles a function for more shapes than by default."""
    dynamo: Any = torch._dynamo.config
    limited: AbstractContextManager[object] = dynamo.patch(recompile_limit=max(dynamo.recompile_limit, _MAX_SHAPES))
    return limited


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the blocks in the outermost block lists whose class occurs there at least `_MIN_REPEATS` times."""
    blocks: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                blocks.extend(child)
            else:
                walk(child)

    walk(model)
    kinds = Counter(type(block) for block in blocks)
    return [block for block in blocks if kinds[type(block)] >= _MIN_REPEATS]


class _SilentProduct(KernelProduct):
    """Multiplies codes without warnings, because the engine lists every layer with the reason."""

    def fall_back(self, layer: QuantizedLayer) -> None:
        """Reports nothing about a layer that computes in floating point."""
