"""How a quantized layer multiplies its codes on a device that can: the interface between layers and kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from edadm_cli.quant.layers import QuantizedLayer


class LayerProduct(Protocol):
    """Multiplies the codes of layers in integers; one object serves all layers of a network.

    A layer asks its product whenever its tensors have moved or changed (`prepare`) and in every forward (`runs`,
    then the call), so `runs` and the call are written such that `torch.compile` can trace them.
    """

    def prepare(self, layer: QuantizedLayer) -> None:
        """Compute what a call needs besides the layer's own tensors, where the layer lies on a device that is served.

        Such tensors are buffers of the layer that are not persistent; buffers of an earlier call are replaced.
        """

    def runs(self, layer: QuantizedLayer) -> bool:
        """Whether the layer is prepared on the device where its codes lie."""

    def fall_back(self, layer: QuantizedLayer) -> None:
        """Report once why a layer computes in floating point; called by eager forwards that do."""

    def __call__(self, layer: QuantizedLayer, x: Tensor) -> Tensor:
        """The layer's output for `x`, in the element type of `x`."""


def deploy(model: nn.Module, product: LayerProduct | None) -> None:
    """Have every quantized layer of `model` multiply its codes by `product`; `None`: quantize-dequantize again."""
    from edadm_cli.quant.layers import quantized_layers

    with torch.no_grad():
        for layer in quantized_layers(model).values():
            layer.deploy(product)
