"""What multiplies the codes of quantized layers in integers, such as kernels for a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from edadm_cli.quant.layers import QuantizedLayer


class LayerProduct(Protocol):
    """Multiplies the codes of layers in integers; one object serves all layers of a network.

    A layer asks its product whenever its tensors have moved or changed (`prepare`) and in every forward (`runs`,
    then the call), so `runs` and the call are written such that `torch.compile` can trace them.
    """

    def prepare(self, layer: QuantizedLayer) -> None:
        """Computes further tensors that a call needs, if the layer is on a device that this product supports.

        These tensors are non-persistent buffers of the layer; buffers of an earlier call are replaced.
        """

    def join(self, model: nn.Module) -> None:
        """Finds layers of a model that may be multiplied together; called once all of them have this product."""

    def runs(self, layer: QuantizedLayer) -> bool:
        """Returns whether the layer is prepared on the device of its codes."""

    def fall_back(self, layer: QuantizedLayer) -> None:
        """Reports once why a layer computes in floating point; called by eager forwards in floating point."""

    def __call__(self, layer: QuantizedLayer, x: Tensor) -> Tensor:
        """Returns the layer's output for `x`, in the element type of `x`."""
