"""A denoiser as the exporter sees it: in the place of every quantized layer stands one symbolic node that names it.

The nodes are replaced by QuantizeLinear and DequantizeLinear after the export, so that integer weights never become
floating-point constants on the way.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.quant.attention import AttentionProducts, QuantizedAttention
from edadm_cli.quant.layers import QuantizedLayer
from edadm_cli.quant.operation import Operation

DOMAIN = "edadm"
LAYER, OPERAND = "QuantizedLayer", "AttentionOperand"
NAME = "layer"


def with_stand_ins(denoiser: nn.Module) -> nn.Module:
    """A float32 copy of a quantized denoiser with stand-ins; tensors are shared where their type allows it."""
    memo: dict[int, Any] = {}
    for name, module in denoiser.named_modules():
        if isinstance(module, QuantizedLayer):
            memo[id(module)] = _LayerStandIn(name, module)
        elif isinstance(getattr(module, "processor", None), QuantizedAttention):
            memo[id(module.processor)] = _AttentionStandIn(name)
    # new parameters around the old storage: a cast of the copy must not reach the original
    memo |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in denoiser.parameters()}
    memo |= {id(b): b.detach() for b in denoiser.buffers()}
    return nn.Module.to(copy.deepcopy(denoiser, memo), "cpu", torch.float32).eval()


class _LayerStandIn(nn.Module):
    """Stands where a quantized layer does, with the attributes that its surroundings read."""

    def __init__(self, name: str, layer: QuantizedLayer) -> None:
        super().__init__()
        self.layer_name, self.operation, self.weight_shape = name, layer.operation, layer.weight_shape
        self.in_features = self.in_channels = layer.in_features
        self.out_features = self.out_channels = layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        """A node that names the layer."""
        shape = output_shape(self.operation, self.weight_shape, x.shape)
        return _node(LAYER, x, self.layer_name, shape)


class _AttentionStandIn(AttentionProducts):
    """Attention whose operands pass through nodes that name them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.attention_name = name

    def on_operand(self, operand: str, tensor: Tensor) -> Tensor:
        """A node that names the operand."""
        return _node(OPERAND, tensor, f"{self.attention_name}.{operand}", tensor.shape)


def output_shape(operation: Operation, weight_shape: tuple[int, ...], shape: torch.Size) -> list[Any]:
    """Shape of a layer's output; sizes may be symbols."""
    if operation.kind == "linear":
        return [*shape[:-1], weight_shape[0]]
    sizes = [
        (shape[2 + i] + 2 * operation.padding[i] - operation.dilation[i] * (weight_shape[2 + i] - 1) - 1)
        // operation.stride[i]
        + 1
        for i in (0, 1)
    ]
    return [shape[0], weight_shape[0], *sizes]


def _node(kind: str, x: Tensor, name: str, shape: Any) -> Tensor:
    result: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{kind}", (x,), {NAME: name}, dtype=torch.float32, shape=list(shape), version=1
    )
    return result
