"""Prepares a denoiser for the exporter: one symbolic node takes the place of every quantized layer and names it.

After the export, these nodes are replaced with QuantizeLinear and DequantizeLinear.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.engines.graph.tracing import LayerStandIn, convolved_sizes, copy_with_stand_ins
from edadm_cli.quant.attention import AttentionProducts, QuantizedAttention
from edadm_cli.quant.layers import QuantizedLayer
from edadm_cli.quant.operation import Operation

DOMAIN = "edadm"
LAYER, OPERAND = "QuantizedLayer", "AttentionOperand"
NAME = "layer"


def with_stand_ins(denoiser: nn.Module) -> nn.Module:
    """Returns a float32 copy of a quantized denoiser with stand-ins for its quantized layers and attentions."""
    stand_ins: dict[int, Any] = {}
    for name, module in denoiser.named_modules():
        if isinstance(module, QuantizedLayer):
            stand_ins[id(module)] = _LayerStandIn(name, module)
        elif isinstance(getattr(module, "processor", None), QuantizedAttention):
            stand_ins[id(module.processor)] = _AttentionStandIn(name)
    return copy_with_stand_ins(denoiser, stand_ins)


class _LayerStandIn(LayerStandIn):
    """Computes one symbolic node that has the layer's name."""

    def __init__(self, name: str, layer: QuantizedLayer) -> None:
        super().__init__(layer)
        self.layer_name = name

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output of a node that names the layer."""
        shape = output_shape(self.operation, self.weight_shape, x.shape)
        return _node(LAYER, x, self.layer_name, shape)


class _AttentionStandIn(AttentionProducts):
    """Computes attention whose operands pass through symbolic nodes that name them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.attention_name = name

    def on_operand(self, operand: str, tensor: Tensor) -> Tensor:
        """Returns the output of a node that names the operand."""
        return _node(OPERAND, tensor, f"{self.attention_name}.{operand}", tensor.shape)


def output_shape(operation: Operation, weight_shape: tuple[int, ...], shape: torch.Size) -> list[Any]:
    """Returns the shape of a layer's output for an input with the shape `shape`; sizes may be symbols."""
    if operation.kind == "linear":
        return [*shape[:-1], weight_shape[0]]
    convolution = (operation.stride, operation.padding, operation.dilation)
    sizes = convolved_sizes(shape[2:], weight_shape[2:], *convolution)
    return [shape[0], weight_shape[0], *sizes]


def _node(kind: str, x: Tensor, name: str, shape: Any) -> Tensor:
    result: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{kind}", (x,), {NAME: name}, dtype=torch.float32, shape=list(shape), version=1
    )
    return result
