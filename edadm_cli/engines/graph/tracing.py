"""A denoiser as a tracer sees it: a stand-in for every quantized layer, and tensors for arguments.

A stand-in costs no arithmetic while tracing. Each engine puts its own nodes in its place in the graph, so that integer
weights never become floating-point constants on the way.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.engines.graph.interface import GraphInterface, class_path
from edadm_cli.quant.layers import QuantizedLayer

WRAPPED = "denoiser"
"""Attribute under which `FlatDenoiser` holds the denoiser: part of the names that tracing gives to nodes."""


@dataclass(eq=False)
class _Returned:
    """Import path of what the denoiser returned; exporters undo what tracing sets on the module itself."""

    path: str | None = None


class FlatDenoiser(nn.Module):
    """A denoiser that takes the inputs of its graph one after another and returns its prediction.

    Args:
        denoiser: The denoiser with stand-ins.
        interface: How calls become inputs.
    """

    def __init__(self, denoiser: nn.Module, interface: GraphInterface) -> None:
        super().__init__()
        self.add_module(WRAPPED, denoiser)
        self.interface, self._returned = interface, _Returned()

    def forward(self, *tensors: Tensor) -> Tensor:
        """Calls the denoiser."""
        inputs = dict(zip(self.interface.inputs, tensors, strict=True))
        output = self.get_submodule(WRAPPED)(**self.interface.call(inputs))
        self._returned.path = class_path(output)
        prediction: Tensor = output[0]
        return prediction

    def traced_interface(self) -> GraphInterface:
        """Returns the interface with the class that the denoiser returned while it was traced."""
        return self.interface.model_copy(update={"returns": self._returned.path})


class LayerStandIn(nn.Module):
    """Stands where a quantized layer does, with the attributes that its surroundings read.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.operation, self.weight_shape = layer.operation, layer.weight_shape
        self.in_features = self.in_channels = layer.in_features
        self.out_features = self.out_channels = layer.out_features


def copy_with_stand_ins(denoiser: nn.Module, stand_ins: dict[int, Any]) -> nn.Module:
    """Returns a float32 copy of a denoiser on the CPU; tensors are shared where their type and device allow it.

    Args:
        denoiser: The denoiser, which is not changed.
        stand_ins: The stand-in of each module or processor that has one, by the `id` of what it replaces.
    """
    memo = dict(stand_ins)
    # new parameters around the old storage: a cast of the copy must not reach the original
    memo |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in denoiser.parameters()}
    memo |= {id(b): b.detach() for b in denoiser.buffers()}
    # diffusers' own `to` refuses casts of quantized models
    return nn.Module.to(copy.deepcopy(denoiser, memo), "cpu", torch.float32).eval()


def convolved_sizes(
    sizes: Sequence[Any], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[Any]:
    """Returns height and width of a convolution's output; sizes may be symbols."""
    return [
        (size + 2 * pad - span * (width - 1) - 1) // step + 1
        for size, width, step, pad, span in zip(sizes, kernel, stride, padding, dilation, strict=True)
    ]
