"""Any denoiser on the kernels: its own forward, with layers that multiply their codes, compiled by torch.

Denoisers whose structure is known are assembled out of fused stages instead (`assembly`).
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
from edadm_cli.engines.cuda.attention_graph import attention_backend
from edadm_cli.engines.cuda.conditioning import condition_at_once
from edadm_cli.engines.cuda.feed_forward import fuse_feed_forwards
from edadm_cli.engines.cuda.flux import fuse_single_blocks
from edadm_cli.engines.cuda.joint_attention import join_streams
from edadm_cli.engines.cuda.layer_product import KernelProduct
from edadm_cli.engines.cuda.lowering import product_refusal
from edadm_cli.engines.listing import list_layers
from edadm_cli.quant.attention import QuantizedAttention
from edadm_cli.quant.layers import QuantizedLayer
from edadm_cli.quant.network import deploy, set_module

_ATTENTION_IS_FLOAT = "operands on the integer grids, products in floating point"
_FUSED_STRUCTURE = "ResnetBlock2D"
_MIN_REPEATS = 4
"""Blocks of one class from which on they are compiled one by one: equal blocks share a compilation."""
_MAX_SHAPES = 64
"""Compilations of one block, each for other sizes of its inputs; torch's own limit is 8, and beyond it raises."""


def has_fused_stages(denoiser: nn.Module) -> bool:
    """Returns whether the assembly knows the structure: UNets of residual blocks."""
    return any(type(module).__name__ == _FUSED_STRUCTURE for module in denoiser.modules())


def build_plain(
    denoiser: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    adapters: Mapping[str, SideBranch] = MappingProxyType({}),
) -> tuple[nn.Module, tuple[LayerExecution, ...]]:
    """Returns a copy of `denoiser` whose layers multiply their codes on `device`, and how each of its layers runs.

    Side branches of LoRA adapters, by the names of their layers, run beside those.

    Tensors that lie on the device in the right element type already are shared with `denoiser`, not copied.
    """
    model = placed_copy(denoiser, device, dtype).eval().requires_grad_(False)
    product = _SilentProduct((device.type,))
    deploy(model, product)
    for name, branch in adapters.items():  # before layers are fused: an adapted one stays by itself
        set_module(model, name, AdaptedLayer(model.get_submodule(name), branch.to(device, dtype)))
    fuse_feed_forwards(model, product)
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
    """Returns a copy of a quantized model on a device, in an element type; codes and scales keep theirs."""
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
    """Has torch compile a model in place: its repeated blocks, which share their compilation, or else the whole.

    Calls belong into `many_shapes`.

    Args:
        model: In place.
        attention: How our kernels compute its attention where they are faster; `None` leaves all of it to torch.
    """
    backend = "inductor" if attention is None else attention_backend(attention)
    blocks = repeated_blocks(model)
    for block in blocks or [model]:
        block.compile(fullgraph=bool(blocks), dynamic=False, backend=backend)
    conditioning = model._modules.get("conditioning")
    if conditioning is not None:
        conditioning.compile(fullgraph=True, dynamic=False)


def many_shapes() -> AbstractContextManager[object]:
    """Lets torch compile a function for more shapes than it does of itself, while entered."""
    dynamo: Any = torch._dynamo.config
    limited: AbstractContextManager[object] = dynamo.patch(recompile_limit=max(dynamo.recompile_limit, _MAX_SHAPES))
    return limited


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the members of the outermost block lists whose classes occur at least `_MIN_REPEATS` times in them."""
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
    """Reports nothing by itself: the engine lists every layer with the reason."""

    def fall_back(self, layer: QuantizedLayer) -> None:
        """Computes in floating point, as listed."""
