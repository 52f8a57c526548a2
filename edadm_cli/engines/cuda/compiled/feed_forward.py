"""Feed-forward layers whose first product writes its output as the codes that the second product reads."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import edadm_kernels as kernels
from edadm_cli.engines.cuda.compiled.layer_product import KernelProduct, as_rows
from edadm_cli.quant.layers import QuantizedLayer


class IntegerFeedForward(nn.Module):
    """Computes a diffusers `FeedForward` with GELU (in its tanh approximation) between two integer layers.

    Args:
        first: The layer before the activation.
        second: The layer after the activation.
        product: It multiplies the codes of both layers.
    """

    def __init__(self, first: QuantizedLayer, second: QuantizedLayer, product: KernelProduct) -> None:
        super().__init__()
        self.first, self.second, self.product = first, second, product

    def forward(self, hidden_states: Tensor, *unused: Any, **ignored: Any) -> Tensor:
        """Returns the output `[..., C]` for `hidden_states` `[..., C]`."""
        first, second = self.first, self.second
        bits = second.plan.activation_bits
        assert bits is not None
        codes = self.product.codes(first, hidden_states)
        hidden = kernels.linear_gelu(
            as_rows(codes),
            self.product.weight(first),
            first.get_buffer("product_scale"),
            first.get_buffer("product_correction"),
            first._buffers["product_bias"],
            second.input_scale.reshape(1),
            second.input_zero_point.reshape(1),
            bits,
        )
        y = self.product.linear(second, hidden, hidden_states.dtype)
        return y.view(*codes.shape[:-1], y.shape[-1])


def fuse_feed_forwards(model: nn.Module, product: KernelProduct) -> None:
    """Replaces the feed-forward layers of a deployed model that `IntegerFeedForward` supports, in place."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            layers = _layers_of(child)
            if layers is not None:
                setattr(parent, name, IntegerFeedForward(*layers, product))


def _layers_of(module: nn.Module) -> tuple[QuantizedLayer, QuantizedLayer] | None:
    if type(module).__name__ != "FeedForward":
        return None
    net: Any = getattr(module, "net", ())
    if len(net) < 3 or type(net[0]).__name__ != "GELU" or net[0].approximate != "tanh":
        return None
    first, second = net[0].proj, net[2]
    if not all(is_served(layer) for layer in (first, second)) or second.transform is not None:
        return None
    return first, second


def is_served(layer: nn.Module) -> bool:
    """Returns whether a layer is an integer linear one on a device whose kernels apply activation and quantizer."""
    return (
        isinstance(layer, QuantizedLayer)
        and layer.operation.kind == "linear"
        and layer.product is not None
        and layer.product.runs(layer)
        and kernels.fuses_gelu(layer.weight_codes)
    )
